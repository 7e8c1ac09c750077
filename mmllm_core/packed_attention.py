"""Attention of conversations that lie end to end in one line, none of which sees another.

In: queries, keys and values of the line, and a `Packing`. Out: what each position attends to, within its conversation.
What all conversations begin with, such as a system message, stands once and is seen by each (shared prefixes: Hydragen,
Juravsky et al., 2024, arXiv:2402.05099). So nothing is spent on padding outside attention, and attention costs what it
costs for conversations apart: conversations of like length are attended to together, one a row. Does not know tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "packed"
"""What transformers knows it by."""


@dataclass(frozen=True)
class Packing:
    """Where conversations lie in a line of t positions: what they share first, then each one's own."""

    n_shared: int
    position_ids: Tensor  # int64 (1, t): counted in each conversation, what is shared included
    starts: Tensor  # int64 (1, t): where the own part of each position's conversation begins; 0 in the shared part
    groups: tuple[Tensor, ...]
    """int64 (n, l) each, conversations of like length: their own positions, short ones filled up with any."""
    order: Tensor  # int64 (t - n_shared,): where each own position comes among those of all groups

    @classmethod
    def of(cls, lengths: Sequence[int], n_shared: int = 0) -> "Packing":
        """Lay out conversations in the order given.

        Args:
            lengths: positions that each has of its own, at least one.
        """
        position_ids, starts = [torch.arange(n_shared)], [torch.zeros(n_shared, dtype=torch.int64)]
        begins, begin = [], n_shared
        for length in lengths:
            position_ids.append(torch.arange(n_shared, n_shared + length))
            starts.append(torch.full((length,), begin))
            begins.append(begin)
            begin += length
        groups, order, placed = [], torch.empty(begin - n_shared, dtype=torch.int64), 0
        for members in _alike(lengths):
            longest = max(lengths[i] for i in members)
            group = torch.full((len(members), longest), n_shared)
            for row, i in enumerate(members):
                own = torch.arange(lengths[i])
                group[row, : lengths[i]] = begins[i] + own
                order[begins[i] - n_shared + own] = placed + row * longest + own
            groups.append(group)
            placed += group.numel()
        return cls(n_shared, torch.cat(position_ids)[None], torch.cat(starts)[None], tuple(groups), order)

    def to(self, device: torch.device | str) -> "Packing":
        """The same on another device."""
        return Packing(
            self.n_shared,
            self.position_ids.to(device),
            self.starts.to(device),
            tuple(group.to(device) for group in self.groups),
            self.order.to(device),
        )


def attend_packed(lm: "PreTrainedModel") -> None:
    """Let an LM attend by this module from now on; every forward pass of it must then be given a `packing`.

    Raises:
        ConfigError: the LM's attention cannot be exchanged.
    """
    from transformers import AttentionInterface

    if not getattr(lm, "_supports_attention_backend", False):
        raise ConfigError(
            f"'{lm.config.model_type}' has an attention of its own, so it cannot be trained: choose another"
        )
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    lm.set_attn_implementation(IMPLEMENTATION)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it (`transformers.AttentionInterface`).

    Args:
        query: (1, h, t, d).
        key, value: (1, h_kv, t, d).
        attention_mask: none is made for an implementation without a mask of its own.
        sliding_window: how many positions each sees, itself included.
        others: of other kinds of attention, unused by Llama, Phi and their like.

    Returns:
        (1, t, h, d), and no weights.

    Raises:
        ConfigError: the LM does more in its attention than this does, or was not given a `packing`.
    """
    if packing is None or any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ConfigError(f"{type(module).__name__} cannot attend to packed conversations: choose another LM")
    line = [x[0].transpose(0, 1) for x in (query, key, value)]  # (t, h, d) each
    n = packing.n_shared
    shared = [x[:n].unsqueeze(0).clone() for x in line]  # (1, n_shared, h, d); a view would keep all of the line

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(module, q, k, v, scaling, dropout, sliding_window)

    rows = []
    for group in packing.groups:
        q, k, v = (x.index_select(0, group.flatten()).unflatten(0, group.shape) for x in line)  # (n, l, h, d)
        if n:
            k, v = (
                torch.cat([common.expand(len(group), -1, -1, -1), own], 1)
                for common, own in zip(shared[1:], (k, v), strict=True)
            )  # (n, n_shared + l, h_kv, d)
        rows.append(attend(q, k, v).flatten(0, 1))
    own = torch.cat(rows).index_select(0, packing.order)  # (t - n_shared, h, d)
    attended = torch.cat([attend(*shared)[0], own]) if n else own
    return attended.unsqueeze(0), None


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Causal attention (n, l, h, d) of the last l of s positions, with keys and values (n, s, h_kv, d)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    n_queries, n_keys = query.shape[1], key.shape[1]
    mask = None  # that is causal, by kernels that need none
    if n_queries < n_keys or (window is not None and window < n_keys):
        mask = _causal(n_queries, n_keys, window, query.dtype, query.device)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (n, h, l, d)
    return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling)[0]


@lru_cache(maxsize=8)  # layers ask for the same ones
def _causal(n_queries: int, n_keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores (l, s): 0 for what a position sees, minus infinity for all else."""
    before = n_keys - n_queries
    with torch.inference_mode(False):  # or training could not use what an evaluation made
        sees = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(before)
        if window is not None:
            sees = sees.triu(before - window + 1)
        return torch.zeros(n_queries, n_keys, dtype=dtype, device=device).masked_fill(~sees, -torch.inf)


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of lengths, in groups of which the longest is at most twice the shortest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and 2 * lengths[i] >= lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
