"""Rendered conversations -> a padded batch of tensors, one or several conversations a row.

Padding is masked by length, never by token id: a tokenizer's pad token may be its end-of-turn token. In a packed row
each conversation counts its positions from 0, by which attention is kept within conversations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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
    pixels: Tensor | None = None  # float32 (n_images, 3, h, w), instead of features
    ids: tuple[str, ...] = ()
    """Of the samples in it."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @property
    def n_supervised(self) -> int:
        """Positions that carry loss: a label at position 0 has nothing before it to predict it."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def n_images(self) -> int:
        """Images in it."""
        shown = self.features if self.pixels is None else self.pixels
        return 0 if shown is None else len(shown)


Images = Sequence[NDArray[np.float16] | NDArray[np.float32]]
"""One array an image, in order of appearance over a whole batch: features (n, d_vision), or pixels (3, h, w)."""


def blank_batch() -> Batch:
    """A batch of one text row without supervised tokens: what a worker runs when the others have more to do."""
    ids = torch.zeros((1, 2), dtype=torch.int64)
    return Batch(ids, torch.ones_like(ids), torch.full_like(ids, IGNORE_INDEX), None)


def collate(
    conversations: Sequence[Rendered],
    images: Images,
    padding: Literal["left", "right"] = "right",
    ids: tuple[str, ...] = (),
) -> Batch:
    """Pad conversations to the longest, one a row.

    Args:
        padding: right for training, left for generation.
        ids: of the samples, for errors.

    Raises:
        ValueError: the number of `images` is not the number of images spoken of.
    """
    length = max(len(c.input_ids) for c in conversations)
    starts = [0 if padding == "right" else length - len(c.input_ids) for c in conversations]
    placed = [(row, start, c) for row, (start, c) in enumerate(zip(starts, conversations, strict=True))]
    return _lay_out(placed, images, (len(conversations), length), ids=ids)


def collate_packed(rows: Sequence[Sequence[Rendered]], images: Images, ids: tuple[str, ...] = ()) -> Batch:
    """Lay several conversations end to end in each row, and pad rows on the right to the longest.

    Args:
        rows: the conversations of each row, such as `mmllm_core.data.batching.pack` chooses.
        images, ids: as for `collate`.

    Raises:
        ValueError: the number of `images` is not the number of images spoken of.
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
    return _lay_out(placed, images, (len(rows), length), position_ids, ids)


def _lay_out(
    placed: Sequence[tuple[int, int, Rendered]],
    images: Images,
    shape: tuple[int, int],
    position_ids: Tensor | None = None,
    ids: tuple[str, ...] = (),
) -> Batch:
    """Write conversations into tensors of `shape`, each at its (row, start)."""
    n_images = sum(conversation.n_images for _, _, conversation in placed)
    if n_images != len(images):
        raise ValueError(f"{n_images} images in the conversations and {len(images)} features")
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, start, conversation in placed:
        span = slice(start, start + len(conversation.input_ids))
        input_ids[row, span] = torch.tensor(conversation.input_ids)
        labels[row, span] = torch.tensor(conversation.labels)
        labels[row, start] = IGNORE_INDEX  # nothing of its own conversation predicts a first token
        attention_mask[row, span] = 1
    stacked = torch.from_numpy(np.stack(images).astype(np.float32)) if images else None
    features, pixels = (None, stacked) if images and images[0].ndim == 3 else (stacked, None)
    return Batch(input_ids, attention_mask, labels, features, position_ids, pixels, ids)
