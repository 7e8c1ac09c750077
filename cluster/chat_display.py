"""An answer as it comes: Markdown that is drawn anew in a terminal, plain text where the output goes elsewhere.

In: pieces of an answer. Out: characters on the console. Does not know where answers come from.
"""

import re
import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from cluster.ask import Answer

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What would move the cursor or change colours, were it written to a terminal."""


def show(pieces: Iterable[Answer], console: Console) -> None:
    """Write an answer out as it comes; what was heard goes before it, and to standard error where it is plain."""
    if console.is_terminal:
        _drawn(pieces, console)
    else:
        _plain(pieces)


def _drawn(pieces: Iterable[Answer], console: Console) -> None:
    text = ""
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for piece in pieces:
                for heard in piece.transcripts:
                    live.console.print(_heard(heard), style="dim", markup=False, highlight=False)
                if piece.text:
                    text += printable(piece.text)
                    live.update(_Tail(text), refresh=True)
    finally:
        console.print(Markdown(text))


def _plain(pieces: Iterable[Answer]) -> None:
    last = "\n"
    try:
        for piece in pieces:
            for heard in piece.transcripts:
                print(_heard(heard), file=sys.stderr)
            if piece.text:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                last = piece.text
    finally:
        if not last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()


def printable(text: str) -> str:
    """Text without what a terminal would obey."""
    return _CONTROL.sub("", text)


def _heard(text: str) -> str:
    return f'heard: "{printable(text)}"' if text.strip() else "heard: no speech"


class _Tail:
    """The last lines of an answer that is still coming: a terminal cannot redraw what has left its screen."""

    def __init__(self, text: str):
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Markdown(self._text), options, pad=False)
        for line in lines[-max(1, console.height - 1) :]:
            yield from line
            yield Segment.line()
