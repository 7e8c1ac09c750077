"""Attention of one step over keys and values that lie in pages (PagedAttention: Kwon et al., 2023, arXiv:2309.06180).

A step is a line of positions of many sequences: first those that decode, one position each, then chunks of prompts.
In: queries, keys and values of the line, a `StepLayout` and a `KvCache`. Out: what each position attends to among all
positions of its own sequence so far. Does not know tokens, nor who owns which page.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmllm_core.packed_attention import attend_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAGE = 16
"""Positions of a page."""
IMPLEMENTATION = "paged"
"""What transformers knows it by."""


class KvCache:
    """Keys and values of all layers, in memory that is taken once.

    Args:
        n_pages: of `PAGE` positions each.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        n_pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (n_layers, n_pages * PAGE, n_kv_heads, head_dim)
        # Written at once: what torch.zeros gives is taken from the system only where it is first written, under load.
        self.keys = torch.empty(shape, dtype=dtype, device=device).zero_()  # (n_layers, n_slots, h_kv, d)
        self.values = torch.empty_like(self.keys).zero_()
        self.n_pages = n_pages

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Put keys and values (t, h_kv, d) of a line where its layout says, slots (t,)."""
        self.keys[layer].index_copy_(0, slots, keys.to(self.keys.dtype))
        self.values[layer].index_copy_(0, slots, values.to(self.values.dtype))


def page_bytes(n_layers: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that a page takes over all layers."""
    return 2 * n_layers * PAGE * n_kv_heads * head_dim * dtype.itemsize


@dataclass(frozen=True)
class Chunk:
    """Consecutive positions of one prompt within a line."""

    row: int
    """Of its sequence in the layout."""
    begin: int
    """Where in the line it begins."""
    length: int


@dataclass(frozen=True)
class StepLayout:
    """Where the sequences of a step lie in its line, and their keys and values in the cache."""

    positions: Tensor  # int64 (t,): counted in each sequence
    slots: Tensor  # int64 (t,): where each position's key and value go
    pages: Tensor  # int32 (n, n_pages): of each sequence, those that decode first; unused ones are 0
    lengths: Tensor  # int32 (n,): positions of each sequence when this step is done
    n_decoding: int
    chunks: tuple[Chunk, ...]
    last: Tensor  # int64 (n_last,): places in the line whose logits are asked for
    rows: Tensor  # int64 (t,): the sequence of each position
    masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        decoding: list[tuple[list[int], int]],
        chunks: list[tuple[list[int], int, int, bool]],
        device: torch.device | str = "cpu",
    ) -> "StepLayout":
        """Lay out a step.

        Args:
            decoding: of each sequence its pages, and the position that it computes.
            chunks: of each prompt its pages, the position where the chunk begins, its length, and whether it ends the
                prompt, so that logits follow.
        """
        pages = [p for p, _ in decoding] + [c[0] for c in chunks]
        widest = max(map(len, pages))
        table = torch.tensor([p + [0] * (widest - len(p)) for p in pages], dtype=torch.int32)  # (n, n_pages)
        n = len(decoding)
        positions = [torch.tensor([at for _, at in decoding], dtype=torch.int64)]
        rows = [torch.arange(n)]
        laid, last, begin = [], list(range(n)), n
        for i, (_, start, length, ends) in enumerate(chunks):
            positions.append(torch.arange(start, start + length))
            rows.append(torch.full((length,), n + i))
            laid.append(Chunk(n + i, begin, length))
            begin += length
            if ends:
                last.append(begin - 1)
        line = torch.cat(positions)  # (t,)
        row = torch.cat(rows)
        slots = table[row, line // PAGE].long() * PAGE + line % PAGE  # (t,)
        lengths = [at + 1 for _, at in decoding] + [start + length for _, start, length, _ in chunks]
        return cls(
            line.to(device),
            slots.to(device),
            table.to(device),
            torch.tensor(lengths, dtype=torch.int32).to(device),
            n,
            tuple(laid),
            torch.tensor(last, dtype=torch.int64).to(device),
            row.to(device),
        )

    @cached_property
    def decoding_slots(self) -> Tensor:
        """Slots of the keys of all decoding sequences, int64 (n_decoding, longest), short ones filled up with any."""
        n = self.n_decoding
        longest = int(self.lengths[:n].max())
        at = torch.arange(longest, device=self.pages.device)
        return self.pages[:n].long()[:, at // PAGE] * PAGE + at % PAGE

    def decoding_mask(self, window: int | None) -> Tensor:
        """Which of `decoding_slots` a sequence sees, bool (n_decoding, 1, 1, longest); all layers ask for the same."""
        if window not in self.masks:
            self.masks[window] = self._decoding_mask(window)
        return self.masks[window]

    def _decoding_mask(self, window: int | None) -> Tensor:
        lengths = self.lengths[: self.n_decoding, None]
        at = torch.arange(self.decoding_slots.shape[1], device=lengths.device)
        sees = at < lengths
        if window is not None:
            sees &= at >= lengths - window
        return sees[:, None, None, :]

    @cached_property
    def chunk_slots(self) -> tuple[Tensor, ...]:
        """Slots of the keys that each chunk sees, int64 (length,)."""
        found = []
        for chunk in self.chunks:
            at = torch.arange(int(self.lengths[chunk.row]), device=self.pages.device)
            found.append(self.pages[chunk.row].long()[at // PAGE] * PAGE + at % PAGE)
        return tuple(found)


def attend(
    query: Tensor,
    layer: int,
    cache: KvCache,
    layout: StepLayout,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """What each position of a line attends to; its own keys and values must be in the cache.

    Args:
        query: (t, h, d).
        window: how many positions each sees, itself included.

    Returns:
        (t, h, d).
    """
    keys, values = cache.keys[layer], cache.values[layer]
    out = []
    if n := layout.n_decoding:
        k, v = (_at(layout.decoding_slots, x).transpose(1, 2) for x in (keys, values))  # (n, h_kv, longest, d)
        mask = layout.decoding_mask(window)
        q = query[:n].unflatten(1, (keys.shape[1], -1))  # (n, h_kv, h / h_kv, d): heads of a group as if positions
        out.append(scaled_dot_product_attention(q, k, v, mask, scale=scaling).flatten(1, 2))
    for chunk, slots in zip(layout.chunks, layout.chunk_slots, strict=True):
        q = query[chunk.begin : chunk.begin + chunk.length].transpose(0, 1).unsqueeze(0)  # (1, h, n, d)
        k, v = (_at(slots, x).transpose(0, 1).unsqueeze(0) for x in (keys, values))  # (1, h_kv, length, d)
        before = len(slots) - chunk.length
        whole = before == 0 and (window is None or window >= len(slots))
        sees = None if whole else _causal(chunk.length, before, window, query.device)
        found = scaled_dot_product_attention(q, k, v, sees, is_causal=whole, scale=scaling, enable_gqa=True)
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


def _at(slots: Tensor, cached: Tensor) -> Tensor:
    """Keys or values (..., h_kv, d) at slots (...)."""
    # index_select copies whole rows, of what is flat; plain indexing goes value by value.
    return cached.flatten(1).index_select(0, slots.flatten()).view(*slots.shape, *cached.shape[1:])


def _causal(n: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """Which of before + n positions the last n see, bool (n, before + n)."""
    sees = torch.ones(n, before + n, dtype=torch.bool, device=device).tril(before)
    return sees if window is None else sees.triu(before - window + 1)


@dataclass(frozen=True)
class Paging:
    """What transformers hands through to `paged_attention`."""

    cache: KvCache
    layout: StepLayout


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    paging: Paging | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it (`transformers.AttentionInterface`), for LMs that are `PACKABLE`.

    Args:
        query: (1, h, t, d).
        key, value: (1, h_kv, t, d); they are written to the cache.

    Returns:
        (1, t, h, d), and no weights.

    Raises:
        ValueError: the LM was not given a `paging`.
    """
    if paging is None:
        raise ValueError(f"{type(module).__name__} attends to pages and was given none")
    layer: int = module.layer_idx  # type: ignore[assignment]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (t, h, d)
    paging.cache.write(layer, k, v, paging.layout.slots)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(q, layer, paging.cache, paging.layout, scale, sliding_window).unsqueeze(0), None


def attend_in_pages(lm: "PreTrainedModel") -> None:
    """Let an LM attend by this module from now on; every forward pass of it must then be given a `paging`.

    Raises:
        ConfigError: the LM's attention is of another kind.
    """
    attend_by(lm, IMPLEMENTATION, paged_attention)
