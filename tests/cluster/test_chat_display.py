"""How an answer is written out."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from cluster.ask import Answer
from cluster.chat_display import show
from mmllm_core.errors import MmllmError


def drawn(*pieces: str, height: int = 10) -> str:
    """What a terminal is sent last: the whole answer, after what was drawn while it came."""
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=height, _environ={})
    show(iter([Answer("", ("good morning",)), *map(Answer, pieces)]), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_markdown_is_drawn_and_what_was_heard_stands_before_it() -> None:
    shown = drawn("**bo", "ld** and\n\n- a\n- b")
    assert "**" not in shown.rpartition("\x1b[2K")[2]
    assert "\x1b[1mbold\x1b[0m" in shown
    assert 'heard: "good morning"' in shown


def test_no_more_is_redrawn_than_a_screen_holds_and_all_of_it_stands_there_at_the_end() -> None:
    words = [f"line{i}\n\n" for i in range(30)]
    shown = drawn(*words, height=6)
    assert max(part.count("\x1b[1A") for part in shown.split("line")) <= 6
    assert all(f"line{i}" in shown.rpartition("\x1b[2K")[2] for i in range(30))


def test_what_a_terminal_would_obey_is_not_written() -> None:
    assert "\x1b]0;owned" not in drawn("hi\x1b]0;owned\x07 there")


def test_what_had_come_is_shown_when_it_breaks_off(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[Answer]:
        yield Answer("Once upon")
        raise MmllmError("the connection broke off")

    with pytest.raises(MmllmError, match="broke off"):
        show(broken(), Console(file=io.StringIO()))
    assert capsys.readouterr().out == "Once upon\n"
