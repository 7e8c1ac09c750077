"""A worker's conversations of one step -> micro-batches, packed.

In: conversations, rendered, each with its images. Out: batches, each of one line. Conversations of like length share a
batch, or as many as fill a number of tokens; each lands in exactly one batch. Does not know files, steps or the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mmllm_core.config import BatchingConfig
from mmllm_core.conversation import Rendered
from mmllm_core.data.collate import Batch, ImageArray, collate_packed


@dataclass(frozen=True)
class Encoded:
    """A conversation ready to be batched."""

    rendered: Rendered
    images: tuple[ImageArray, ...]
    id: str = ""

    @property
    def n_tokens(self) -> int:
        """Positions it takes, images included."""
        return len(self.rendered.input_ids)


def micro_batches(conversations: Sequence[Encoded], config: BatchingConfig, size: int) -> list[Batch]:
    """Batch a worker's share of a step, each batch packed into one line.

    Args:
        size: conversations of a batch, or, with `pack_tokens`, how many times that a batch holds; the last may have
            less.

    Raises:
        ValueError: a conversation is longer than `pack_tokens`.
    """
    rows = fill_rows(conversations, config)
    return [_collate([c for row in rows[at : at + size] for c in row]) for at in range(0, len(rows), size)]


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


def fill_rows(conversations: Sequence[Encoded], config: BatchingConfig) -> list[list[Encoded]]:
    """What `micro_batch` counts: conversations, or, with `pack_tokens`, as many together as fit.

    Raises:
        ValueError: a conversation is longer than `pack_tokens`.
    """
    if config.pack_tokens is not None:
        placed = pack([c.n_tokens for c in conversations], config.pack_tokens)
        return [[conversations[i] for i in row] for row in placed]
    if config.grouping == "none":
        return [[c] for c in conversations]
    return [[c] for c in sorted(conversations, key=lambda c: c.n_tokens)]


def _collate(conversations: Sequence[Encoded]) -> Batch:
    images = [image for c in conversations for image in c.images]
    return collate_packed([c.rendered for c in conversations], images, tuple(c.id for c in conversations))
