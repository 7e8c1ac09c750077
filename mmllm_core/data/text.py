"""Text conversations in the chat format of OpenAI's fine-tuning files, commonly JSON Lines.

In: a JSON value `{"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}`, where the content
may also be a list of `{"type": "text", "text": ...}`. Out: a `Record` without images. Does not know files.
"""

from typing import Any, cast, get_args

from mmllm_core.conversation import Role
from mmllm_core.data.record import MalformedRow, Record, Turn


def is_chat(value: Any) -> bool:
    """Whether a row looks like a chat file's."""
    return isinstance(value, dict) and "messages" in value


def chat_record(value: Any) -> Record:
    """Read a row.

    Raises:
        MalformedRow: a key of another type than the format says, another role, or a part that is not text.
    """
    if not isinstance(value, dict):
        raise MalformedRow(f"expected an object, found {type(value).__name__}")
    messages = value.get("messages")
    if not isinstance(messages, list):
        raise MalformedRow("'messages' must be a list of messages")
    identity = value.get("id")
    turns = tuple(_turn(message, f"messages.{i}") for i, message in enumerate(messages))
    return Record("" if identity is None else str(identity), (), turns)


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise MalformedRow(f"'{where}' must be an object with 'role' and 'content'")
    role = message.get("role")
    if role not in get_args(Role):
        raise MalformedRow(f"'{where}.role' is {role!r}: it must be system, user or assistant")
    return Turn(cast(Role, role), _text(message.get("content"), f"{where}.content"))


def _text(content: Any, where: str) -> str:
    """Parts stand on lines of their own, as the renderer sets them."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise MalformedRow(f"'{where}' must be a string or a list of text parts: rows with images go in LLaVA's format")
    return "\n".join(texts)
