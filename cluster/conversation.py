"""A conversation with a running assistant: what was said, what goes along with the next question, and a file of it.

In: questions, pictures and recordings. Out: answers in pieces, and Markdown or JSON. Each request carries the whole
conversation, for the service keeps none. Does not know terminals.
"""

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.ask import Answer, Asker, message_of
from cluster.attachment import Attachment
from mmllm_core.errors import BadInput, MmllmError


@dataclass
class Turn:
    """A question and its answer."""

    question: str
    attached: tuple[Attachment, ...] = ()
    heard: tuple[str, ...] = ()
    """In each of the attached recordings."""
    answer: str = ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As the API takes it."""
        asked = message_of(self.question, self.attached)
        return [asked, {"role": "assistant", "content": self.answer}] if self.answer else [asked]


@dataclass
class Conversation:
    """Turns with one service.

    Args:
        settings: of the API, sent with each question.
        system: what the assistant is told before all else.
    """

    asker: Asker
    settings: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    attached: list[Attachment] = field(default_factory=list)
    """What goes along with the next question."""
    turns: list[Turn] = field(default_factory=list)

    def ask(self, question: str) -> Generator[Answer, None, None]:
        """Ask, and yield the answer in pieces; of transcripts, those of this turn's recordings.

        An answer that is stopped or breaks off is kept as far as it came. A turn without any is forgotten, and what was
        attached goes along with the next one.

        Raises:
            EnvironmentLack, MmllmError: as `Asker.stream`, or the answer came back empty.
        """
        turn = Turn(question, tuple(self.attached))
        sounds = sum(attachment.kind == "audio" for attachment in turn.attached)
        try:
            with closing(self.asker.stream([*self.messages, *turn.messages], **self.settings)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    heard = piece.transcripts[-sounds:] if sounds else ()
                    turn.heard += heard
                    turn.answer += piece.text
                    yield Answer(piece.text, heard)
        finally:
            if turn.answer:
                self.turns.append(turn)
                self.attached.clear()
        if not turn.answer:
            raise MmllmError("the answer came back empty: ask again, or in another way")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All that was said, as the API takes it."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        return told + [message for turn in self.turns for message in turn.messages]

    def reset(self) -> None:
        """Begin anew."""
        self.turns.clear()
        self.attached.clear()

    def save(self, path: Path) -> None:
        """Write the conversation: JSON that can be sent again where the name ends in .json, and Markdown otherwise.

        Raises:
            BadInput: there is nothing to save, or the file exists or cannot be written.
        """
        if not self.turns:
            raise BadInput("there is nothing to save yet")
        told = {"model": self.asker.model, "messages": self.messages}
        is_json = path.suffix.lower() == ".json"
        text = json.dumps(told, indent=1, ensure_ascii=False) if is_json else self._markdown()
        try:
            with path.expanduser().open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise BadInput(f"{path}: cannot be written: {error.strerror}") from error

    def _markdown(self) -> str:
        parts = [f"# A conversation with {self.asker.model}"]
        parts += [f"**system**\n\n{self.system}"] if self.system else []
        for turn in self.turns:
            names = [f"*{attachment.kind}: {attachment.name}*" for attachment in turn.attached]
            heard = [f"> heard: {text}" for text in turn.heard]
            asked = "\n\n".join(part for part in [*names, *heard, turn.question] if part)
            parts += [f"**you**\n\n{asked}", f"**{self.asker.model}**\n\n{turn.answer}"]
        return "\n\n".join(parts)
