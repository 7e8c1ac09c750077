"""A conversation as a row of an Arrow table: one schema for every dataset, and the way between rows and samples.

In and out: `Row`s (plain dicts, as `datasets` gives them) and `Sample`s. Does not know files, formats or mixtures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from mmllm_core.conversation import ImagePart, Message, Part, Role, SpeechPart, TextPart
from mmllm_core.data.sample import Sample

if TYPE_CHECKING:
    from datasets import Features


class PartRow(TypedDict):
    """A part of a message; an image has no text."""

    type: Literal["text", "image", "speech"]
    text: str | None


class MessageRow(TypedDict):
    """A turn."""

    role: Role
    parts: list[PartRow]


class Row(TypedDict):
    """A conversation; the i-th image part belongs to the i-th of `images`."""

    id: str
    images: list[str]
    """Paths, absolute or relative to the dataset's image folder."""
    messages: list[MessageRow]


def row_features() -> "Features":
    """The schema of `Row`: id, images: list<string>, messages: list<{role, parts: list<{type, text}>}>."""
    from datasets import Features, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "parts": List(part)}
    return Features({"id": Value("string"), "images": List(Value("string")), "messages": List(message)})


def row_of(id: str, images: Sequence[str], messages: Sequence[Message]) -> Row:
    """A conversation as a row."""
    turns: list[MessageRow] = [{"role": m.role, "parts": [_part_row(part) for part in m.parts]} for m in messages]
    return {"id": id, "images": list(images), "messages": turns}


def sample_of(row: Row | dict[str, Any], *, source: str, images: Path | None = None) -> Sample:
    """A row as a sample, whose id names source and row.

    Args:
        source: what the mixture calls the dataset.
        images: folder that relative image paths start from.
    """
    messages = tuple(
        Message(cast(Role, message["role"]), tuple(_part(part) for part in message["parts"]))
        for message in row["messages"]
    )
    folder = images or Path()
    return Sample(f"{source}/{row['id']}", tuple(folder / name for name in row["images"]), messages)


def _part_row(part: Part) -> PartRow:
    if isinstance(part, ImagePart):
        return {"type": "image", "text": None}
    if isinstance(part, SpeechPart):
        return {"type": "speech", "text": part.transcript}
    return {"type": "text", "text": part.text}


def _part(row: Any) -> Part:
    if row["type"] == "image":
        return ImagePart()
    return SpeechPart(row["text"]) if row["type"] == "speech" else TextPart(row["text"])
