"""Rendered conversations -> a padded batch of tensors, one or several conversations a row.

Padding is masked by length, never by token id: a tokenizer's pad token may be its end-of-turn token. In a packed row
each conversation counts its positions from 0, by which attention is kept within conversations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmllm_core.conversation import IGNORE_INDEX, Rendered


@dataclass(frozen=True)
class Batch:
    """Tensors of one batch; b rows of at most t tokens."""

    input_ids: Tensor  # int64 (b, t)
    attention_mask: Tensor  # int64 (b, t)
    labels: Tensor  # int64 (b, t)
    features: Tensor | None  # float32 (n_images, n, d_vision)
    position_ids: Tensor | None = None  # int64 (b, t), of packed rows

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        tensors = {name: t.to(device) for name, t in vars(self).items() if t is not None}
        return Batch(**({"features": None} | tensors))

    @property
    def n_supervised(self) -> int:
        """Positions that carry loss: a label at position 0 has nothing before it to predict it."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


def collate(
    conversations: Sequence[Rendered],
    features: Sequence[NDArray[np.float16]],
    padding: Literal["left", "right"] = "right",
) -> Batch:
    """Pad conversations to the longest, one a row.

    Args:
        features: one (n, d_vision) array an image, in order of appearance over the whole batch.
        padding: right for training, left for generation.

    Raises:
        ValueError: the number of features is not the number of images.
    """
    length = max(len(c.input_ids) for c in conversations)
    starts = [0 if padding == "right" else length - len(c.input_ids) for c in conversations]
    placed = [(row, start, c) for row, (start, c) in enumerate(zip(starts, conversations, strict=True))]
    return _lay_out(placed, features, (len(conversations), length))


def collate_packed(rows: Sequence[Sequence[Rendered]], features: Sequence[NDArray[np.float16]]) -> Batch:
    """Lay several conversations end to end in each row, and pad rows on the right to the longest.

    Args:
        rows: the conversations of each row, such as `mmllm_core.data.batching.pack` chooses.
        features: as for `collate`.

    Raises:
        ValueError: the number of features is not the number of images.
    """
    length = max(sum(len(c.input_ids) for c in row) for row in rows)
    placed = []
    # What follows the last conversation counts from 0 as well, so that it is a sequence of its own: padding.
    position_ids = torch.arange(length).repeat(len(rows), 1)  # (b, t)
    for number, row in enumerate(rows):
        start = 0
        for conversation in row:
            placed.append((number, start, conversation))
            start += len(conversation.input_ids)
            position_ids[number, start:] = torch.arange(length - start)
    return _lay_out(placed, features, (len(rows), length), position_ids)


def _lay_out(
    placed: Sequence[tuple[int, int, Rendered]],
    features: Sequence[NDArray[np.float16]],
    shape: tuple[int, int],
    position_ids: Tensor | None = None,
) -> Batch:
    """Write conversations into tensors of `shape`, each at its (row, start)."""
    n_images = sum(conversation.n_images for _, _, conversation in placed)
    if n_images != len(features):
        raise ValueError(f"{n_images} images in the conversations and {len(features)} features")
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, start, conversation in placed:
        span = slice(start, start + len(conversation.input_ids))
        input_ids[row, span] = torch.tensor(conversation.input_ids)
        labels[row, span] = torch.tensor(conversation.labels)
        labels[row, start] = IGNORE_INDEX  # nothing of its own conversation predicts a first token
        attention_mask[row, span] = 1
    stacked = torch.from_numpy(np.stack(features).astype(np.float32)) if features else None
    return Batch(input_ids, attention_mask, labels, stacked, position_ids)
