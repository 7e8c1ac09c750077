"""Conversations that are kept: in the browser, and in files, Markdown to read and JSON to go on with.

In: Gradio's history. Out: entries for the browser's storage and back, or text. Files stay on the page's server and are
named; of pictures the browser keeps a small copy besides, which takes a picture's place when its file is deleted. Does
not know the browser.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from gradio.processing_utils import save_bytes_to_cache
from PIL import Image

from serve_apps.chat_page.messages import IMAGE_SUFFIXES, Message, is_added, items_of, kind_of

SMALL_PIXELS = 336
"""Longest side of the copy that the browser keeps: what the largest CLIP here sees of a picture."""
MAX_PIXELS = 50_000_000
"""Of a picture that is made small."""
MAX_SMALL_BYTES = 200_000
_SPEAKERS = {"user": "You", "assistant": "Assistant"}


def title_of(history: list[Message]) -> str:
    """What a conversation is called in the list: how its first question begins."""
    items = [item for entry in history if entry["role"] == "user" for item in items_of(entry["content"])]
    text = next((item if isinstance(item, str) else item.name for item in items), "")
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


def to_stored(history: list[Message]) -> list[Message]:
    """A history as the browser keeps it: `{"role", "kind", "content"}`, texts and `{"path", "small"}`."""
    return [
        {
            "role": entry["role"],
            "kind": kind_of(entry),
            "content": [_stored_item(item) for item in items_of(entry["content"])],
        }
        for entry in history
    ]


def from_stored(entries: Any, folder: Path) -> list[Message]:
    """A history that a browser kept, fit to be shown again; what has another shape is left out.

    The browser names files of this server. Gradio would hand out any of the temporary folder or of the working
    directory, so files elsewhere are never shown. Where a file is gone, a picture's small copy is laid down anew, and
    other files are named.

    Args:
        folder: where visitors' files lie.
    """
    history = []
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case {"role": "user" | "assistant" as role, "kind": str() | None as kind, "content": list() as content}:
                shown = [_shown_item(item, folder) for item in content]
                history.append({"role": role, "content": [item for item in shown if item]} | _metadata(kind))
    return [entry for entry in history if entry["content"]]


def _metadata(kind: str | None) -> Message:
    return {"metadata": {"id": kind}} if kind else {}


def _stored_item(item: str | Path) -> Any:
    if isinstance(item, str):
        return item
    return {"path": str(item)} | ({"small": small} if (small := _small_copy(item)) else {})


@lru_cache(maxsize=256)  # a conversation is kept with every answer, and its files never change
def _small_copy(path: Path) -> str:
    """A picture as a small WebP in base64, or "" if it cannot be read."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return ""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                return ""
            image.draft("RGB", (SMALL_PIXELS, SMALL_PIXELS))
            small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    small.thumbnail((SMALL_PIXELS, SMALL_PIXELS))
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=80)
    return base64.b64encode(stream.getvalue()).decode()


def _shown_item(item: Any, folder: Path) -> Any:
    match item:
        case str():
            return item
        case {"path": str() as name}:
            path = Path(name).resolve()
            if path.is_relative_to(folder.resolve()) and path.is_file():
                return {"path": str(path)}
            given = Path(name)
            return _small_file(given, item.get("small"), folder) or f"[{given.name} is no longer here]"
    return None


def _small_file(path: Path, small: Any, folder: Path) -> Message | None:
    """A picture's small copy as a file of its own; None if there is none that is a picture."""
    try:
        data = base64.b64decode(small, validate=True) if isinstance(small, str) else b""
        if not 0 < len(data) <= MAX_SMALL_BYTES:
            return None
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            if max(image.size) > SMALL_PIXELS:
                return None
            image.load()
    except (OSError, ValueError, binascii.Error):
        return None
    return {"path": save_bytes_to_cache(data, f"{path.stem} (small).webp", str(folder))}


def to_markdown(history: list[Message]) -> str:
    """The conversation to read, with what was heard and how fast answers came."""
    blocks, speaker = [], None
    for entry in history:
        if entry["role"] != speaker:
            speaker = entry["role"]
            blocks.append(f"## {_SPEAKERS.get(speaker, speaker)}")
        blocks += [f"*{item.name}*" if isinstance(item, Path) else item for item in items_of(entry["content"])]
    return "\n\n".join(blocks) + "\n" if blocks else ""


def to_json(history: list[Message]) -> str:
    """The turns as OpenAI's messages, without what the page added; files by their names."""
    messages: list[Message] = []
    for entry in history:
        if is_added(entry):
            continue
        text = "\n".join(f"[{item.name}]" if isinstance(item, Path) else item for item in items_of(entry["content"]))
        if messages and messages[-1]["role"] == entry["role"]:
            messages[-1]["content"] += f"\n{text}"
        else:
            messages.append({"role": entry["role"], "content": text})
    return json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"
