"""Rendered conversations -> a batch of tensors: padded, one a row, or packed end to end in one line.

Padding is masked by length, never by token id: a tokenizer's pad token may be its end-of-turn token. In a packed line
nothing is padded, and what all conversations begin with stands once (`mmllm_core.packed_attention`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmllm_core.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID, Rendered
from mmllm_core.packed_attention import Packing

WORTH_SHARING = 8
"""Positions that conversations must have in common at least, for them to stand once: attention over them is apart."""


@dataclass(frozen=True)
class Batch:
    """Tensors of one batch; b rows of at most t tokens."""

    input_ids: Tensor  # int64 (b, t)
    attention_mask: Tensor  # int64 (b, t)
    labels: Tensor  # int64 (b, t)
    features: Tensor | None  # float32 (n_images, n, d_vision)
    pixels: Tensor | None = None  # float32 (n_images, 3, h, w), instead of features
    packing: Packing | None = None
    """Of conversations in one line, for which b = 1."""
    ids: tuple[str, ...] = ()
    """Of the samples in it."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Packing)
        }
        return replace(self, **moved)

    @property
    def n_supervised(self) -> int:
        """Positions that carry loss: a label at position 0 has nothing before it to predict it."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def n_tokens(self) -> int:
        """Positions that are computed, without padding; what packed conversations share counts once."""
        return int(self.attention_mask.sum())

    @property
    def n_read(self) -> int:
        """Positions of all conversations; what packed ones share counts with each."""
        repeated = 0 if self.packing is None else self.packing.n_shared * (self.packing.n_conversations - 1)
        return self.n_tokens + repeated

    @property
    def n_images(self) -> int:
        """Images in it."""
        shown = self.features if self.pixels is None else self.pixels
        return 0 if shown is None else len(shown)


ImageArray = NDArray[np.float16] | NDArray[np.float32]
"""Of one image: features (n, d_vision), or pixels (3, h, w) where the model has the vision tower."""
Images = Sequence[ImageArray]
"""In order of appearance over a whole batch."""


def blank_batch() -> Batch:
    """A batch of text without supervised tokens: what a worker runs when the others have more to do."""
    return collate_packed([Rendered([0, 0], [IGNORE_INDEX] * 2, 0)], [])


def collate(
    conversations: Sequence[Rendered],
    images: Images,
    padding: Literal["left", "right"] = "right",
    ids: tuple[str, ...] = (),
) -> Batch:
    """Pad conversations to the longest, one a row.

    Args:
        padding: right for a forward pass, left for generation.
        ids: of the samples, for errors.

    Raises:
        ValueError: the number of `images` is not the number of images spoken of.
    """
    length = max(len(c.input_ids) for c in conversations)
    batch = _blank((len(conversations), length), conversations, images, ids)
    for row, conversation in enumerate(conversations):
        start = 0 if padding == "right" else length - len(conversation.input_ids)
        _write(batch, row, start, conversation, 0)
    return batch


def collate_packed(conversations: Sequence[Rendered], images: Images, ids: tuple[str, ...] = ()) -> Batch:
    """Lay conversations end to end in one line; what all of them begin with stands once, at its start.

    Args:
        images, ids: as for `collate`.

    Raises:
        ValueError: the number of `images` is not the number of images spoken of.
    """
    n_shared = _n_shared(conversations)
    packing = Packing.of([len(c.input_ids) - n_shared for c in conversations], n_shared)
    batch = _blank((1, packing.position_ids.shape[1]), conversations, images, ids)
    start = 0
    for conversation in conversations:
        _write(batch, 0, start, conversation, n_shared if start else 0)
        start += len(conversation.input_ids) - (n_shared if start else 0)
    return replace(batch, packing=packing)


def _n_shared(conversations: Sequence[Rendered]) -> int:
    """Tokens that all conversations begin with, before any image and any supervised token; 0 if few.

    The token after them must not be supervised either: what predicts it is shared.
    """
    first = conversations[0]
    if len(conversations) == 1:
        return 0
    n = min(_n_plain(c) for c in conversations)
    tokens = (c.input_ids[:n] for c in conversations[1:])
    n = min(
        next((i for i, (a, b) in enumerate(zip(first.input_ids, row, strict=False)) if a != b), n) for row in tokens
    )
    return n if n >= WORTH_SHARING else 0


def _n_plain(conversation: Rendered) -> int:
    """Tokens before the last one that come before any image and are followed by no supervised one."""
    ends = (
        i
        for i, (token, following) in enumerate(zip(conversation.input_ids, conversation.labels[1:], strict=False))
        if token == IMAGE_TOKEN_ID or following != IGNORE_INDEX
    )
    return next(ends, len(conversation.input_ids) - 1)


def _blank(shape: tuple[int, int], conversations: Sequence[Rendered], images: Images, ids: tuple[str, ...]) -> Batch:
    """A batch of `shape` with images and nothing but padding."""
    n_images = sum(conversation.n_images for conversation in conversations)
    if n_images != len(images):
        raise ValueError(f"{n_images} images in the conversations and {len(images)} features")
    stacked = torch.from_numpy(np.stack(images).astype(np.float32)) if images else None
    features, pixels = (None, stacked) if images and images[0].ndim == 3 else (stacked, None)
    return Batch(
        input_ids=torch.zeros(shape, dtype=torch.int64),
        attention_mask=torch.zeros(shape, dtype=torch.int64),
        labels=torch.full(shape, IGNORE_INDEX, dtype=torch.int64),
        features=features,
        pixels=pixels,
        ids=ids,
    )


def _write(batch: Batch, row: int, start: int, conversation: Rendered, skipped: int) -> None:
    """Write a conversation, but for its first `skipped` tokens, into a batch at (row, start)."""
    ids, labels = conversation.input_ids[skipped:], conversation.labels[skipped:]
    span = slice(start, start + len(ids))
    batch.input_ids[row, span] = torch.tensor(ids)
    batch.labels[row, span] = torch.tensor(labels)
    batch.labels[row, start] = IGNORE_INDEX  # nothing of its own conversation predicts a first token
    batch.attention_mask[row, span] = 1
