"""A conversation as a file holds it, and the rules that it must keep to be learned from.

In: a `Record`, which the reader of a format (`llava.py`, `text.py`) made of a JSON value. Out: its faults, its
messages, its Arrow row. The linter counts the faults and the loaders stop at the first: the rules are the same.
Does not know files, image contents or tokens.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from mmllm_core.conversation import ImagePart, Message, Part, Role, TextPart
from mmllm_core.data.rows import Row, row_of

PLACEHOLDER = "<image>"
"""Where an image belongs in a user's turn, as in LLaVA. In a row without images it is text like any other."""

_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_GARBLED = re.compile("\ufffd|[ÂÃ][\x80-\xbf]|â\x80|â€")
"""The replacement character, and UTF-8 that was once read as Latin-1 or Windows-1252 ('Ã©' for 'é')."""


class FaultKind(StrEnum):
    """What can be wrong with a row; the value is what a person reads."""

    NOT_JSON = "not JSON"
    MALFORMED = "malformed row"
    ENCODING = "not UTF-8"
    GARBLED = "garbled text"
    EMPTY_TURN = "empty turn"
    TURN_ORDER = "turn order"
    PLACEHOLDERS = "image placeholders"
    STRAY_PLACEHOLDER = "placeholder without image"
    MISSING_IMAGE = "missing image"
    BROKEN_IMAGE = "broken image"
    UNSUPERVISED = "nothing to learn"
    NOT_RENDERED = "cannot be rendered"
    OVER_LONG = "too long"
    DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a row."""

    kind: FaultKind
    detail: str


class MalformedRow(ValueError):
    """A JSON value that is no conversation of the format; caught where the file and the row are known."""


@dataclass(frozen=True)
class Turn:
    """What one side said, placeholders included."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One conversation of a file."""

    id: str
    """The file's own id, or empty."""
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def record_faults(record: Record) -> Iterator[Fault]:
    """All that is wrong with a conversation by itself; nothing is read from disk."""
    yield from _encoding_faults(record)
    for i, turn in enumerate(record.turns, start=1):
        if not turn.text.strip():
            yield Fault(FaultKind.EMPTY_TURN, f"turn {i} ({turn.role}) has no text")
    if (fault := _turn_order_fault(record)) is not None:
        yield fault
    if record.images:
        found = sum(turn.text.count(PLACEHOLDER) for turn in record.turns if turn.role == "user")
        if found != len(record.images):
            yield Fault(
                FaultKind.PLACEHOLDERS,
                f"{len(record.images)} images and {found} placeholders {PLACEHOLDER} in the user's turns",
            )
    # An assistant's turn with text has at least one token, and only such turns carry labels.
    if not any(turn.role == "assistant" and turn.text.strip() for turn in record.turns):
        yield Fault(FaultKind.UNSUPERVISED, "the assistant says nothing, so no token would be supervised")


def prevents_loading(fault: Fault) -> bool:
    """Whether a loader refuses the row. Garbled text and stray placeholders are learned as they stand: only a person
    can tell what was meant."""
    return fault.kind not in (FaultKind.GARBLED, FaultKind.STRAY_PLACEHOLDER)


def messages_of(record: Record) -> tuple[Message, ...]:
    """The turns as messages: placeholders in the user's turns become image parts if the row has images."""
    return tuple(
        Message(turn.role, _parts(turn.text) if record.images and turn.role == "user" else (TextPart(turn.text),))
        for turn in record.turns
    )


def record_row(record: Record, number: int) -> Row:
    """The record as an Arrow row, whose id holds the row's number: a file's own ids need not differ."""
    return row_of(f"{number}:{record.id}" if record.id else str(number), record.images, messages_of(record))


def _parts(text: str) -> tuple[Part, ...]:
    parts: list[Part] = []
    for i, piece in enumerate(text.split(PLACEHOLDER)):
        if i > 0:
            parts.append(ImagePart())
        if piece.strip():
            parts.append(TextPart(piece.strip()))
    return tuple(parts)


def _turn_order_fault(record: Record) -> Fault | None:
    """A system turn may lead; then user and assistant take turns, and the assistant has the last word."""
    turns = record.turns[1:] if record.turns and record.turns[0].role == "system" else record.turns
    first = len(record.turns) - len(turns) + 1
    if not turns:
        return Fault(FaultKind.TURN_ORDER, "the conversation has no turns")
    for i, turn in enumerate(turns):
        expected = "user" if i % 2 == 0 else "assistant"
        if turn.role != expected:
            return Fault(FaultKind.TURN_ORDER, f"turn {first + i} is the {turn.role}'s and should be the {expected}'s")
    if len(turns) % 2:
        return Fault(FaultKind.TURN_ORDER, "the last turn is the user's: no answer follows")
    return None


def _encoding_faults(record: Record) -> Iterator[Fault]:
    for where, text in _texts(record):
        if _CONTROL.search(text):
            yield Fault(FaultKind.GARBLED, f"{where} holds a control character")
        if text.isascii():  # known to Python without a look at the text
            continue
        if _SURROGATES.search(text):
            yield Fault(FaultKind.ENCODING, f"{where} holds bytes that are not UTF-8, or half of a surrogate pair")
        elif (found := _GARBLED.search(text)) is not None:
            yield Fault(FaultKind.GARBLED, f"{where} holds {found[0]!r}: it was decoded wrongly before")


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    yield "the id", record.id
    for name in record.images:
        yield "an image's name", name
    for i, turn in enumerate(record.turns, start=1):
        yield f"turn {i}", turn.text
