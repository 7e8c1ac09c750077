"""Attention of conversations that lie end to end in one line, none of which sees another.

In: queries, keys and values of the line, and a `Packing`. Out: what each position attends to, within its conversation.
What all conversations begin with, such as a system message, stands once and is seen by each (shared prefixes: Hydragen,
Juravsky et al., 2024, arXiv:2402.05099). So nothing is spent on padding outside attention. In it, conversations of like
length are attended to together, one a row, the short ones filled up: at most twice their own positions. Does not know
tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "packed"
"""What transformers knows it by."""
PACKABLE = frozenset(
    {
        "gemma",
        "gemma3_text",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)
"""By `model_type`: LMs whose attention was found to be this module's, window and all. Others may accept it and yet
differ: some know a window by their masks alone, which are not given here, and some mix positions outside attention."""


@dataclass(frozen=True)
class Packing:
    """Where conversations lie in a line of t positions: what they share first, then each one's own."""

    n_shared: int
    position_ids: Tensor  # int64 (1, t): counted in each conversation, what is shared included
    starts: Tensor  # int64 (1, t): where the own part of each position's conversation begins; 0 in the shared part
    groups: tuple[Tensor, ...]
    """int64 (n, l) each, conversations of like length: their own positions, short ones filled up with any."""
    order: Tensor  # int64 (t - n_shared,): where each own position comes among those of all groups
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict, repr=False, compare=False)
    """By queries, keys and window: all layers ask for the same ones."""

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

    @property
    def n_conversations(self) -> int:
        """How many lie in the line."""
        return sum(map(len, self.groups))

    @property
    def n_queries(self) -> int:
        """Positions that attention is computed for, those that short conversations are filled up with included."""
        return self.n_shared + sum(group.numel() for group in self.groups)

    @property
    def n_keys(self) -> int:
        """Positions that attention reads: the shared ones once for each conversation, and once for themselves."""
        return self.n_queries + self.n_shared * self.n_conversations

    def to(self, device: torch.device | str) -> "Packing":
        """The same on another device."""
        return Packing(
            self.n_shared,
            self.position_ids.to(device),
            self.starts.to(device),
            tuple(group.to(device) for group in self.groups),
            self.order.to(device),
        )


def require_packable(model_type: str) -> None:
    """Raise unless LMs of this type can attend to several conversations in a line, as they must to train or serve.

    Raises:
        ConfigError: the type is not in `PACKABLE`.
    """
    if model_type not in PACKABLE:
        known = ", ".join(sorted(PACKABLE))
        raise ConfigError(
            f"'{model_type}': such LMs cannot be trained on packed conversations, nor answer several requests "
            f"together: choose one of {known}"
        )


def attend_packed(lm: "PreTrainedModel") -> None:
    """Let an LM attend by this module from now on; every forward pass of it must then be given a `packing`.

    Raises:
        ConfigError: the LM cannot attend to packed conversations.
    """
    attend_by(lm, IMPLEMENTATION, packed_attention)


def attend_by(lm: "PreTrainedModel", implementation: str, attention: Callable[..., tuple[Tensor, None]]) -> None:
    """Let an LM attend by a function of ours, under the name that transformers shall know it by.

    Raises:
        ConfigError: the LM's attention is of another kind than ours.
    """
    from transformers import AttentionInterface

    require_packable(lm.config.model_type)
    AttentionInterface.register(implementation, attention)
    lm.set_attn_implementation(implementation)


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
        others: of other kinds of attention, unused by LMs that are `PACKABLE`.

    Returns:
        (1, t, h, d), and no weights.

    Raises:
        ValueError: the LM was not given a `packing`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is None:
        raise ValueError(f"{type(module).__name__} attends to packed conversations and was given none")
    line = [x[0].transpose(0, 1) for x in (query, key, value)]  # (t, h, d) each
    n = packing.n_shared
    shared = [x[:n].unsqueeze(0).clone() for x in line]  # (1, n_shared, h, d); a view would keep all of the line

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = _mask(packing, q, k.shape[1], sliding_window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (n, h, l, d)
        out: Tensor = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling)[0]
        return out

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


def _mask(packing: Packing, query: Tensor, n_keys: int, window: int | None) -> Tensor | None:
    """What is added to scores (l, s) of the last l of s positions: 0 for what each sees, minus infinity for all else.

    None where attention is merely causal, for which there are kernels that need no mask.
    """
    n_queries = query.shape[1]
    if n_queries == n_keys and (window is None or window >= n_keys):
        return None
    if (n_queries, n_keys, window) not in packing.masks:
        before = n_keys - n_queries
        with torch.inference_mode(False):  # or a batch could not be trained on once it was evaluated
            sees = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device).tril(before)
            if window is not None:
                sees = sees.triu(before - window + 1)
            mask = torch.zeros(n_queries, n_keys, dtype=query.dtype, device=query.device)
            packing.masks[n_queries, n_keys, window] = mask.masked_fill(~sees, -torch.inf)
    return packing.masks[n_queries, n_keys, window]


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of lengths, in groups of which the longest is at most twice the shortest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and 2 * lengths[i] >= lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
