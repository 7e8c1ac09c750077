"""Conversations that are kept: in the browser, and in files, Markdown to read and JSON to go on with.

In: Gradio's history. Out: the same as far as it may be shown again, or text; files are named, not copied. Does not know
the browser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve_apps.chat_page.messages import Message, is_added, items_of

_SPEAKERS = {"user": "You", "assistant": "Assistant"}


def kept(history: list[Message], folder: Path) -> list[Message]:
    """A history that a browser kept, fit to be shown again.

    The browser names files of this server. Gradio would hand out any of the temporary folder or of the working
    directory, so files elsewhere are never shown; those and the ones that are deleted by now are named instead.

    Args:
        folder: where visitors' files lie.
    """
    return [entry | {"content": [_kept_item(item, folder) for item in _listed(entry["content"])]} for entry in history]


def _listed(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


def _kept_item(item: Any, folder: Path) -> Message:
    [found] = items_of(item)
    if isinstance(found, str):
        return {"type": "text", "text": found}
    path = found.resolve()
    if path.is_relative_to(folder.resolve()) and path.is_file():
        return {"type": "file", "file": {"path": str(path)}}
    return {"type": "text", "text": f"[{found.name} is no longer here]"}


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
    messages = [
        {
            "role": entry["role"],
            "content": "\n".join(f"[{i.name}]" if isinstance(i, Path) else i for i in items_of(entry["content"])),
        }
        for entry in history
        if not is_added(entry)
    ]
    return json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"
