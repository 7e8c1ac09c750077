"""A stream of conversations -> a stream of batches that waste little on padding.

In: conversations as they come, rendered, each with its images' features. Out: batches. A window of conversations is
looked over at once; within it, conversations of like length and modality share a batch (LLaVA's
`group_by_modality_length`), or several are packed into one row. Which conversation lands where follows from the seed
and the stream alone, and every conversation lands in exactly one batch. Does not know files or the model.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mmllm_core.config import BatchingConfig
from mmllm_core.conversation import Rendered
from mmllm_core.data.collate import Batch, collate, collate_packed


@dataclass(frozen=True)
class Encoded:
    """A conversation ready to be batched."""

    rendered: Rendered
    features: tuple[NDArray[np.float16], ...]  # (n, d_vision) each, one an image

    @property
    def n_tokens(self) -> int:
        """Positions it takes, images included."""
        return len(self.rendered.input_ids)


def batches(
    conversations: Iterator[Encoded], config: BatchingConfig, *, micro_batch: int, seed: int = 0
) -> Iterator[Batch]:
    """Batch a stream.

    Args:
        micro_batch: rows of a batch; the last batch of a window may have fewer.
        seed: of the order of batches within a window, when they are grouped or packed.

    Raises:
        ValueError: a conversation is longer than the rows it is to be packed into.
    """
    if config.grouping == "none" and config.pack_tokens is None:
        while chosen := list(islice(conversations, micro_batch)):
            yield _collate([[c] for c in chosen], packed=False)
        return
    rng = random.Random(seed)
    while window := list(islice(conversations, config.window * micro_batch)):
        groups = [
            rows[at : at + micro_batch]
            for rows in _rows_by_kind(window, config)
            for at in range(0, len(rows), micro_batch)
        ]
        rng.shuffle(groups)
        for group in groups:
            yield _collate(group, packed=config.pack_tokens is not None)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Place items into rows of `capacity`: first-fit decreasing, at most 11/9 of the fewest rows possible (plus one).

    Returns:
        Indices of the items of each row.

    Raises:
        ValueError: an item is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a conversation of {length} tokens does not fit rows of {capacity}: raise pack_tokens")
        row = next((i for i, left in enumerate(free) if left >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(index)
        free[row] -= length
    return rows


def _rows_by_kind(window: Sequence[Encoded], config: BatchingConfig) -> Iterator[list[list[Encoded]]]:
    """Rows of a window that may share a batch, in the order in which they are cut into batches."""
    kinds = [list(window)]
    if config.grouping == "modality":
        kinds = [[c for c in window if c.features], [c for c in window if not c.features]]
    for kind in kinds:
        if config.pack_tokens is not None:
            yield [[kind[i] for i in row] for row in pack([c.n_tokens for c in kind], config.pack_tokens)]
        else:
            yield [[c] for c in sorted(kind, key=lambda c: c.n_tokens)]


def _collate(rows: Sequence[Sequence[Encoded]], *, packed: bool) -> Batch:
    features = [feature for row in rows for c in row for feature in c.features]
    if packed:
        return collate_packed([[c.rendered for c in row] for row in rows], features)
    return collate([c.rendered for row in rows for c in row], features)
