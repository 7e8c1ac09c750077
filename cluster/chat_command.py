"""`mmllm chat`: talk to a running assistant in the terminal, ask it once, or put it into a pipe.

Options and standard input in, answers out; the work is done by `cluster.conversation` and `cluster.chat_repl`. Exit
codes: 0, 1 for what the service or a file refuses, 2 for wrong usage, 130 for Ctrl-C, 141 where nobody reads on.
"""

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console

from cluster.keys_commands import ApiKeyOption
from mmllm_core.errors import BadInput


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="Ask once; what is piped in follows it. Without either, talk until Ctrl-D.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to send along; may be repeated.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A recording to send along; may be repeated.")] = None,
    base_url: Annotated[
        str, typer.Option("--base-url", "--url", help="Where the assistant is served.")
    ] = "http://127.0.0.1:8000",
    api_key: ApiKeyOption = "local",
    model: Annotated[str | None, typer.Option(help="Who shall answer; the first that is served.")] = None,
    system: Annotated[str | None, typer.Option(help="What the assistant is told before all else.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; the service's own bound.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="The service's own if not given.")] = None,
) -> None:
    """Talk to a running assistant in the terminal, or ask it once."""
    from cluster.ask import Asker
    from cluster.attachment import Attachment
    from cluster.chat_display import show
    from cluster.chat_repl import Repl
    from cluster.conversation import Conversation

    question = "\n\n".join(part for part in (prompt, _piped()) if part and part.strip())
    attached = [Attachment.read(path, "image") for path in image or []]
    attached += [Attachment.read(path, "audio") for path in audio or []]
    console = Console()
    talks = not question and sys.stdin.isatty() and console.is_terminal
    if not (question or attached or talks):
        raise click.UsageError("Nothing to ask: give a question, pipe one in, or talk in a terminal.")
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    settings = {name: value for name, value in settings.items() if value is not None}
    conversation = Conversation(Asker(base_url, api_key, model), settings, system, attached)
    if talks:
        Repl(conversation, console).run()
        return
    try:
        with closing(conversation.ask(question)) as pieces:
            show(pieces, console)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        raise typer.Exit(141) from None


def _piped() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadInput("standard input is no text in UTF-8: give a file by --image or --audio") from None
