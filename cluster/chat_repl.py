"""Talking to an assistant in a terminal: a line is a question, a line that begins with a slash is a command.

In: what a person types. Out: answers on the console, and errors as one line, after which one goes on. Lines are kept in
`MMLLM_HOME/chat_history`. Ctrl-C ends the answer that is coming, or the line that is typed; Ctrl-D leaves.
"""

import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.attachment import Attachment, Kind
from cluster.chat_display import printable, show
from cluster.conversation import Conversation
from mmllm_core.errors import BadInput, MmllmError
from mmllm_core.models.home import home

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History


@dataclass(frozen=True)
class Command:
    """What a line that begins with a slash does."""

    run: Callable[[str], None]
    usage: str
    meaning: str
    takes_file: bool = False


class Repl:
    """The loop of one terminal."""

    def __init__(self, conversation: Conversation, console: Console):
        self._conversation = conversation
        self._console = console
        self._is_over = False
        self.commands = {
            "/image": Command(self._image, "/image FILE", "send a picture with the next question", takes_file=True),
            "/audio": Command(self._audio, "/audio FILE", "send a recording with it; an empty line asks", True),
            "/model": Command(self._model, "/model [NAME]", "who answers; with a name, who shall answer"),
            "/reset": Command(self._reset, "/reset", "begin a new conversation"),
            "/save": Command(self._save, "/save FILE", "write the conversation: .md, or .json to send again", True),
            "/help": Command(self._help, "/help", "show this"),
            "/quit": Command(self._quit, "/quit", "leave, as Ctrl-D does"),
        }

    def run(self) -> None:
        """Read lines until the end."""
        session = self._session()
        asker = self._conversation.asker
        self._say(f"{asker.model} at {asker.base_url}. /help shows the commands, Ctrl-D leaves.")
        while not self._is_over:
            try:
                line = session.prompt(self._prompt())
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            try:
                self.take(line)
            except KeyboardInterrupt:
                self._say("(stopped)")
            except MmllmError as error:
                self._console.print(f"[bold red]mmllm:[/bold red] {printable(str(error))}", highlight=False)

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            MmllmError: it cannot be done.
            KeyboardInterrupt: the answer was stopped; what had come of it is kept.
        """
        word, _, rest = line.strip().partition(" ")
        if line.startswith("/"):
            if word not in self.commands:
                raise BadInput(f"{word} is no command: /help shows them; a question that begins so is indented")
            self.commands[word].run(rest.strip())
        elif line.strip() or self._conversation.attached:
            with closing(self._conversation.ask(line.strip())) as pieces:
                show(pieces, self._console)

    def _image(self, rest: str) -> None:
        self._attach(rest, "image")

    def _audio(self, rest: str) -> None:
        self._attach(rest, "audio")

    def _attach(self, rest: str, kind: Kind) -> None:
        attachment = Attachment.read(_path(rest, self.commands[f"/{kind}"].usage), kind)
        self._conversation.attached.append(attachment)
        self._say(f"{attachment.name} goes along with the next question")

    def _model(self, rest: str) -> None:
        asker = self._conversation.asker
        if rest:
            asker.choose(rest)
        for model in asker.models:
            self._say(f"{'*' if model == asker.model else ' '} {model}")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._say("a new conversation")

    def _save(self, rest: str) -> None:
        path = _path(rest, self.commands["/save"].usage)
        self._conversation.save(path)
        self._say(f"saved to {path}")

    def _help(self, _: str) -> None:
        for command in self.commands.values():
            self._say(f"{command.usage:<16}{command.meaning}")
        self._say("Alt-Enter begins another line. Ctrl-C stops an answer.")

    def _quit(self, _: str) -> None:
        self._is_over = True

    def _say(self, text: str) -> None:
        self._console.print(printable(text), style="dim", markup=False, highlight=False, soft_wrap=True)

    def _prompt(self) -> str:
        names = ", ".join(printable(attachment.name) for attachment in self._conversation.attached)
        return f"you [{names}] > " if names else "you > "

    def _session(self) -> "PromptSession[str]":
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        return PromptSession(
            history=_history(), completer=self._completer(), complete_while_typing=False, key_bindings=keys
        )

    def _completer(self) -> "Completer":
        from prompt_toolkit.completion import NestedCompleter, PathCompleter, WordCompleter

        after = {name: PathCompleter(expanduser=True) if c.takes_file else None for name, c in self.commands.items()}
        return NestedCompleter(after | {"/model": WordCompleter(self._conversation.asker.models)})


def _path(text: str, usage: str) -> Path:
    """A path as it is typed, or as a terminal pastes a file that is dropped on it: quoted or escaped."""
    if not text:
        raise BadInput(f"which file? {usage}")
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    return Path(words[0] if len(words) == 1 else text).expanduser()


def _history() -> "History":
    """Earlier lines, in a file that nobody else reads; only in memory where none can be kept."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = home() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
