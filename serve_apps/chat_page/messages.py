"""What is on the page as messages of the API.

In: Gradio's history and the new question. Out: OpenAI's messages, pictures and recordings in base64. Files are read
that Gradio handed over, no others. Does not know HTTP.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from mmllm_core.errors import MmllmError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
AUDIO_SUFFIXES = (".wav", ".mp3", ".m4a", ".flac", ".ogg", ".opus", ".webm", ".aac")
MAX_FILE_BYTES = 16 * 2**20  # 22.4 MB as base64: one such file fits into a request
HEARD, NOTICE, PRINT = "heard", "notice", "print"
"""Metadata ids of what the page adds to an answer; never sent back to the model."""

Message = dict[str, Any]


class QuestionError(MmllmError):
    """A question that the page cannot send: empty, too large, or of a kind that nobody here reads."""


def to_messages(history: list[Message], new_message: Message, system: str = "") -> list[Message]:
    """Turn the page's history and the new `{"text", "files"}` into API messages.

    Turns without an answer (refused, failed, stopped early) are left out, so one bad file cannot spoil the rest.

    Args:
        system: what the assistant is told before all else, if anything.

    Raises:
        QuestionError: there is nothing to send, or a file that cannot be sent.
        OSError: a file of the conversation is gone.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    asked: Any = None
    for entry in history:
        if is_added(entry):
            continue
        if entry["role"] == "user":
            asked = entry["content"]
        elif asked and (text := text_of(entry["content"])):
            messages += [{"role": "user", "content": _to_parts(asked)}, {"role": "assistant", "content": text}]
            asked = None
    files = [file if isinstance(file, dict) else {"path": file} for file in new_message.get("files") or []]
    question = _to_parts([*files, new_message.get("text") or ""])
    if not question:
        raise QuestionError("Type a question, or add a picture or a recording.")
    return [*messages, {"role": "user", "content": question}]


def is_added(entry: Message) -> bool:
    """Whether the page itself added this to an answer."""
    return (entry.get("metadata") or {}).get("id") in (HEARD, NOTICE, PRINT)


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


def _to_parts(content: Any) -> list[Message]:
    parts: list[Message] = []
    for item in items_of(content):
        if isinstance(item, Path):
            parts.append(_file_part(item))
        elif item.strip():
            parts.append({"type": "text", "text": item})
    return parts


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
