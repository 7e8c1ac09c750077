"""How many LM positions a conversation takes, with as little tokenizing as the question allows.

In: records and a `Rendering`. Out: whether a record fits, or its exact length by `mmllm_core.conversation.render`.
Does not know files.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmllm_core.conversation import Message, Rendered, Role, render
from mmllm_core.data.record import Fault, FaultKind, Record, messages_of
from mmllm_core.errors import ConversationError

_UNLIMITED = 1 << 40
_SPLITTERS = {"ByteLevel", "Split", "Digits", "Metaspace"}
"""Pre-tokenizers that cut a text and change no byte of it."""


@dataclass(frozen=True)
class Rendering:
    """What decides a conversation's length."""

    tokenizer: Path
    """Folder of a tokenizer with a chat template."""
    n_image_tokens: int
    max_length: int


class LengthBound:
    """An upper bound of a record's length, from the bytes of its texts.

    `render` tokenizes scaffold and contents apart. The scaffold depends on the roles alone, so it is rendered once for
    each order of roles that occurs. A content's tokens are never more than its UTF-8 bytes: with byte-level BPE, and
    with SentencePiece and byte fallback, a token spells at least one byte. A tokenizer that sets a space before each
    piece of text may add a token to each piece, and `render` cuts a text into at most as many pieces as it has bytes:
    twice the bytes bound it. Tokenizers with any other normalizer may lengthen a text, and have no bound here.
    """

    def __init__(self, rendering: Rendering):
        self._rendering = rendering
        self._tokens_a_byte = _tokens_a_byte(load_cached(rendering.tokenizer))
        self._scaffolds: dict[tuple[Role, ...], int | None] = {}

    def fits(self, record: Record) -> bool:
        """True if the record surely renders to at most `max_length` positions; False says nothing."""
        scaffold = self._scaffold(record)
        if self._tokens_a_byte is None or scaffold is None:
            return False
        n_bytes = sum(_utf8_length(turn.text) for turn in record.turns)
        # Between the parts of a turn, render sets a newline where the file had at least one placeholder's bytes.
        images = self._rendering.n_image_tokens * len(record.images)
        return scaffold + self._tokens_a_byte * n_bytes + images <= self._rendering.max_length

    def _scaffold(self, record: Record) -> int | None:
        """Tokens around the contents; None where the template refuses such an order of roles."""
        roles = tuple(turn.role for turn in record.turns)
        if roles not in self._scaffolds:
            tokenizer = load_cached(self._rendering.tokenizer)
            found = _rendered(tuple(Message.text(role, "x") for role in roles), tokenizer, self._rendering)
            contents = len(tokenizer("x", add_special_tokens=False).input_ids) * len(roles)
            self._scaffolds[roles] = None if isinstance(found, Fault) else len(found.input_ids) - contents
        return self._scaffolds[roles]


def length_faults(records: Sequence[Record], rendering: Rendering) -> list[Fault | None]:
    """Render each record and say whether it is too long, or cannot be rendered."""
    tokenizer = load_cached(rendering.tokenizer)
    faults: list[Fault | None] = []
    for record in records:
        found = _rendered(messages_of(record), tokenizer, rendering)
        if isinstance(found, Rendered) and len(found.input_ids) > rendering.max_length:
            detail = f"takes {len(found.input_ids)} tokens, images included, and at most {rendering.max_length} fit"
            faults.append(Fault(FaultKind.OVER_LONG, detail))
        else:
            faults.append(found if isinstance(found, Fault) else None)
    return faults


@lru_cache(maxsize=1)
def load_cached(folder: Path) -> Any:
    """A tokenizer; a process that checks many batches loads it once."""
    from mmllm_core.language import load_tokenizer

    return load_tokenizer(folder)


def _rendered(messages: tuple[Message, ...], tokenizer: Any, rendering: Rendering) -> Rendered | Fault:
    try:
        return render(
            messages,
            tokenizer,
            n_image_tokens=rendering.n_image_tokens,
            max_length=_UNLIMITED,
            generation_prompt=False,
        )
    except ConversationError as error:
        return Fault(FaultKind.NOT_RENDERED, str(error))


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _tokens_a_byte(tokenizer: Any) -> int | None:
    """1, 2 with a space before each piece, None if nothing is known."""
    if not tokenizer.is_fast:
        return None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizers, splitters = backend["model"], _steps(backend["normalizer"]), _steps(backend["pre_tokenizer"])
    byte_level = any(step["type"] == "ByteLevel" for step in splitters)
    known = (
        model["type"] == "BPE"
        and (byte_level or model.get("byte_fallback"))
        and all(step["type"] in _SPLITTERS for step in splitters)
        and all(step["type"] == "Prepend" or step.get("content") == "\u2581" for step in normalizers)
    )
    if not known:
        return None
    return 2 if normalizers or any(step.get("add_prefix_space", not byte_level) for step in splitters) else 1


def _steps(part: Any) -> list[Any]:
    """A normalizer or pre-tokenizer of `tokenizer.json` as a list of its steps."""
    if part is None:
        return []
    return part.get("normalizers") or part.get("pretokenizers") or [part]
