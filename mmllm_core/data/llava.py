"""LLaVA's format (Liu et al., 2023, arXiv:2304.08485): LLaVA-Instruct-150K, LLaVA-Pretrain-558K and their kin.

In: a JSON value `{"id": ..., "image": name | [names] | missing, "conversations": [{"from": "human", "value": ...},
{"from": "gpt", "value": ...}, ...]}`. Out: a `Record`. A human's turn holds `<image>` where an image belongs, before or
after the question. Does not know files; `json_rows` reads both the array of the published files and JSON Lines.
"""

from collections.abc import Iterator
from typing import Any

from mmllm_core.conversation import Role
from mmllm_core.data.record import PLACEHOLDER, Fault, FaultKind, MalformedRow, Record, Turn, record_faults

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def is_llava(value: Any) -> bool:
    """Whether a row looks like LLaVA's."""
    return isinstance(value, dict) and "conversations" in value


def llava_record(value: Any) -> Record:
    """Read a row.

    Raises:
        MalformedRow: a key of another type than the format says, or a speaker that it does not know.
    """
    if not isinstance(value, dict):
        raise MalformedRow(f"expected an object, found {type(value).__name__}")
    turns = value.get("conversations")
    if not isinstance(turns, list):
        raise MalformedRow("'conversations' must be a list of turns")
    identity = value.get("id")
    return Record(
        "" if identity is None else str(identity), _images(value), tuple(_turn(turn, i) for i, turn in enumerate(turns))
    )


def llava_faults(record: Record) -> Iterator[Fault]:
    """All that is wrong with a conversation by itself, and a placeholder where the row has no image: the key may be
    forgotten or misspelt."""
    yield from record_faults(record)
    if not record.images and any(PLACEHOLDER in turn.text for turn in record.turns if turn.role == "user"):
        yield Fault(FaultKind.STRAY_PLACEHOLDER, f"{PLACEHOLDER} in a row without 'image' is read as text")


def _images(value: dict[str, Any]) -> tuple[str, ...]:
    names = value.get("image")
    if names is None:  # tables that give all rows all columns fill what a row lacks with nulls
        names = value.get("images")
    if names is None:
        return ()
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        raise MalformedRow("'image' must be a file name or a list of file names")
    return tuple(names)


def _turn(turn: Any, i: int) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise MalformedRow(f"'conversations.{i}' must be an object with the strings 'from' and 'value'")
    role = _ROLES.get(turn["from"]) if isinstance(turn.get("from"), str) else None
    if role is None:
        raise MalformedRow(f"'conversations.{i}.from' is {turn.get('from')!r}: it must be human, gpt or system")
    return Turn(role, turn["value"])
