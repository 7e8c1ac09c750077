"""Rendered conversations -> a padded batch of tensors.

Padding is masked by length, never by token id: a tokenizer's pad token may be its end-of-turn token.
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
    """Tensors of one batch; b conversations of at most t tokens."""

    input_ids: Tensor  # int64 (b, t)
    attention_mask: Tensor  # int64 (b, t)
    labels: Tensor  # int64 (b, t)
    features: Tensor | None  # float32 (n_images, n, d_vision)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        features = None if self.features is None else self.features.to(device)
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), features)

    @property
    def n_supervised(self) -> int:
        """Positions that carry loss: a label at position 0 has nothing before it to predict it."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


def collate(
    conversations: Sequence[Rendered],
    features: Sequence[NDArray[np.float16]],
    padding: Literal["left", "right"] = "right",
) -> Batch:
    """Pad conversations to the longest.

    Args:
        features: one (n, d_vision) array an image, in order of appearance over the whole batch.
        padding: right for training, left for generation.

    Raises:
        ValueError: the number of features is not the number of images.
    """
    n_images = sum(conversation.n_images for conversation in conversations)
    if n_images != len(features):
        raise ValueError(f"{n_images} images in the conversations and {len(features)} features")
    shape = (len(conversations), max(len(c.input_ids) for c in conversations))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, conversation in enumerate(conversations):
        length = len(conversation.input_ids)
        span = slice(0, length) if padding == "right" else slice(shape[1] - length, shape[1])
        input_ids[row, span] = torch.tensor(conversation.input_ids)
        labels[row, span] = torch.tensor(conversation.labels)
        attention_mask[row, span] = 1
    stacked = torch.from_numpy(np.stack(features).astype(np.float32)) if features else None
    return Batch(input_ids, attention_mask, labels, stacked)
