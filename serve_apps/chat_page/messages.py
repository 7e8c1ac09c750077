"""What is on the page as messages of the API.

In: Gradio's history, which ends with a question. Out: OpenAI's messages, pictures and recordings in base64. Files are
read that Gradio handed over, no others. Does not know HTTP.

A question is one or more entries of the user's in a row: its text, each file in one of its own, and the files' names.
For Gradio edits the first entry, forgets what else is in that, and offers it only where the last one is a text.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mmllm_core.errors import MmllmError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
AUDIO_SUFFIXES = (".wav", ".mp3", ".m4a", ".flac", ".ogg", ".opus", ".webm", ".aac")
MAX_FILE_BYTES = 16 * 2**20  # 22.4 MB as base64: one such file fits into a request
HEARD, NOTICE, PRINT = "heard", "notice", "print"
"""Metadata ids of what the page adds to what is said; never sent back to the model."""

Message = dict[str, Any]


class QuestionError(MmllmError):
    """A question that the page cannot send: empty, too large, or of a kind that nobody here reads."""


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        messages: OpenAI's.
        pictures: names of all pictures in it, in order.
        recordings: how many the question itself has; they come last.
    """

    messages: list[Message]
    pictures: list[str]
    recordings: int


def question_of(message: Message | None) -> list[Message]:
    """What stands in the box, `{"text", "files"}`, as entries of the history; none if it is empty."""
    text, files = ((message or {}).get(name) for name in ("text", "files"))
    paths = [file["path"] if isinstance(file, dict) else file for file in files or []]
    asked: list[Message] = [{"role": "user", "content": text}] if text and text.strip() else []
    entries = asked + [{"role": "user", "content": {"path": path}} for path in paths]
    if not asked or not paths:
        return entries
    names = " · ".join(shown_name(Path(path).name) for path in paths)
    return [*entries, {"role": "user", "content": f"<small>{names}</small>", "metadata": {"id": PRINT}}]


def shown_name(name: str) -> str:
    """A file's name in Markdown, whatever is in it."""
    return f"`{name.replace('`', '')}`"


def to_call(history: list[Message], system: str = "") -> Call:
    """Turn the page's history into a request.

    Questions without an answer (refused, failed, stopped early) are left out, so one bad file cannot spoil the rest.

    Args:
        system: what the assistant is told before all else, if anything.

    Raises:
        QuestionError: a file that cannot be sent.
        OSError: a file of the conversation is gone.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    pictures: list[str] = []
    question: list[str | Path] = []
    for role, entries in groupby(history, key=lambda entry: entry["role"]):
        if role == "user":
            question = [item for entry in entries if not is_added(entry) for item in items_of(entry["content"])]
        elif text := "".join(text_of(entry["content"]) for entry in entries if not is_added(entry)):
            messages += [_asked(question), {"role": "assistant", "content": text}]
            pictures += _pictures(question)
    messages.append(_asked(question))
    recordings = sum(part["type"] == "input_audio" for part in messages[-1]["content"])
    return Call(messages, pictures + _pictures(question), recordings)


def is_added(entry: Message) -> bool:
    """Whether the page itself added this to what is said."""
    return kind_of(entry) in (HEARD, NOTICE, PRINT)


def kind_of(entry: Message) -> str | None:
    """The metadata id of an entry."""
    return (entry.get("metadata") or {}).get("id")


def items_of(content: Any) -> list[str | Path]:
    """What a message holds, in its order: texts, and paths of files.

    Args:
        content: as Gradio gives it, a string, or strings, text items and file items.
    """
    items: list[str | Path] = []
    for item in content if isinstance(content, list) else [content]:
        text = item if isinstance(item, str) else item.get("text")
        items.append(Path((item.get("file") or item)["path"]) if text is None else text)
    return items


def text_of(content: Any) -> str:
    """The text of a message, without its files."""
    return "".join(item for item in items_of(content) if isinstance(item, str))


def _asked(question: list[str | Path]) -> Message:
    parts = [_file_part(item) for item in question if isinstance(item, Path)]
    parts += [{"type": "text", "text": item} for item in question if isinstance(item, str)]
    return {"role": "user", "content": parts}


def _pictures(question: list[str | Path]) -> list[str]:
    return [item.name for item in question if isinstance(item, Path) and item.suffix.lower() in IMAGE_SUFFIXES]


def _file_part(path: Path) -> Message:
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES + AUDIO_SUFFIXES:
        raise QuestionError(f"{path.name} is neither a picture nor a recording that can be read here.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise QuestionError(f"{path.name} is larger than {MAX_FILE_BYTES // 2**20} MB.")
    data = base64.b64encode(path.read_bytes()).decode()
    kind = suffix[1:]
    if suffix in AUDIO_SUFFIXES:
        return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind.replace('jpg', 'jpeg')};base64,{data}"}}
