"""How many LM positions a conversation takes, with as little tokenizing as the question allows.

In: records and a `Rendering`. Out: whether a record fits, or its exact length. Does not know files.

Lengths are those of `mmllm_core.conversation.render`, which tokenizes scaffold and contents apart. The scaffold depends
on the roles alone and is rendered once for each order of roles; contents are cut by the renderer's own functions and
tokenized many at once, which takes a third of the time. A test holds the two equal.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from mmllm_core.conversation import Message, Role, control_tokens, render, text_pieces, text_runs
from mmllm_core.data.record import Fault, FaultKind, Record, messages_of
from mmllm_core.errors import ConversationError

_SPLITTERS = {"ByteLevel", "Split", "Digits", "Metaspace"}
"""Pre-tokenizers that cut a text and change no byte of it."""


@dataclass(frozen=True)
class Rendering:
    """What decides a conversation's length."""

    tokenizer: Path
    """Folder of a tokenizer with a chat template."""
    n_image_tokens: int
    max_length: int


class LengthCounter:
    """Counts the positions of records.

    Args:
        rendering: whose tokenizer is loaded.
    """

    def __init__(self, rendering: Rendering):
        from mmllm_core.language import load_tokenizer

        self._rendering = rendering
        self._tokenizer: Any = load_tokenizer(rendering.tokenizer)
        self._control = control_tokens(self._tokenizer)
        self._tokens_a_byte = _tokens_a_byte(self._tokenizer)
        self._scaffolds: dict[tuple[Role, ...], int | Fault] = {}

    def surely_fits(self, record: Record) -> bool:
        """True if the record renders to at most `max_length` positions, by the bytes of its texts; False says nothing.

        A content's tokens are never more than its UTF-8 bytes: with byte-level BPE, and with SentencePiece and byte
        fallback, a token spells at least one byte. A tokenizer that sets a space before each piece of text may add a
        token to each, and a text is cut into at most as many pieces as it has bytes: twice the bytes bound it. A
        tokenizer with any other normalizer may lengthen a text and has no bound here.
        """
        scaffold = self._scaffold(record)
        if self._tokens_a_byte is None or isinstance(scaffold, Fault):
            return False
        # Between the parts of a turn stands a newline where the file had at least a placeholder's bytes.
        n_bytes = sum(_utf8_length(turn.text) for turn in record.turns)
        images = self._rendering.n_image_tokens * len(record.images)
        return scaffold + self._tokens_a_byte * n_bytes + images <= self._rendering.max_length

    def faults(self, records: Sequence[Record]) -> list[Fault | None]:
        """Why each record does not fit, if it does not; tokenizes its contents."""
        pieces = [
            [
                piece
                for message in messages_of(record)
                for run in text_runs(message)
                if run
                for piece in text_pieces(run, self._control)
            ]
            for record in records
        ]
        counts = iter(self._count([piece for of_record in pieces for piece in of_record]))
        contents = [sum(islice(counts, len(of_record))) for of_record in pieces]
        return [self._fault(record, n) for record, n in zip(records, contents, strict=True)]

    def _fault(self, record: Record, n_content: int) -> Fault | None:
        scaffold = self._scaffold(record)
        if isinstance(scaffold, Fault):
            return scaffold
        length = scaffold + n_content + self._rendering.n_image_tokens * len(record.images)
        if length <= self._rendering.max_length:
            return None
        return Fault(
            FaultKind.OVER_LONG,
            f"takes {length} tokens, images included, and at most {self._rendering.max_length} fit",
        )

    def _count(self, texts: list[str]) -> list[int]:
        if not self._tokenizer.is_fast:
            return [len(self._tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(encoding) for encoding in encoded]

    def _scaffold(self, record: Record) -> int | Fault:
        """Tokens around the contents, or why the template refuses such an order of roles."""
        roles = tuple(turn.role for turn in record.turns)
        if roles not in self._scaffolds:
            contents = sum(self._count(["x"] * len(roles)))
            try:
                rendered = render(
                    [Message.text(role, "x") for role in roles],
                    self._tokenizer,
                    n_image_tokens=self._rendering.n_image_tokens,
                    max_length=sys.maxsize,
                    generation_prompt=False,
                )
                self._scaffolds[roles] = len(rendered.input_ids) - contents
            except ConversationError as error:
                self._scaffolds[roles] = Fault(FaultKind.NOT_RENDERED, str(error))
        return self._scaffolds[roles]


@lru_cache(maxsize=1)
def counter(rendering: Rendering) -> LengthCounter:
    """The counter of this process: its tokenizer is loaded once for all batches."""
    return LengthCounter(rendering)


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
