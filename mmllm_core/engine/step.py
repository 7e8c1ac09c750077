"""One step of an LM over a line of positions: embeddings -> logits, keys and values into the cache.

`PlainStep` is transformers' own forward pass, for every LM whose attention can be paged, quantized or adapted as it may
be; `mmllm_core.engine.lean_step` has a faster one for some. Does not know requests or sampling.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mmllm_core.engine.lean_step import LeanStep, is_lean
from mmllm_core.engine.packed_linear import pack_linears
from mmllm_core.engine.paged_attention import KvCache, Paging, StepLayout, attend_in_pages
from mmllm_core.engine.rope import Rope, RopeOfLine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Step(Protocol):
    """Advances all sequences of a layout at once."""

    def rope_of(self, limit: int) -> Rope:
        """How to tell positions of a sequence that may take so many, from its first to its last."""
        ...

    def __call__(self, embeddings: Tensor, layout: StepLayout, ropes: Sequence[Rope]) -> Tensor:
        """Compute a line of embeddings (t, d_model), write its keys and values, and give logits (n_last, vocab)."""
        ...


class PlainStep:
    """The LM's own forward pass, with its linear layers packed where they can be.

    Raises:
        ConfigError: the LM's attention cannot be paged, or how it tells positions depends on what else is computed.
    """

    def __init__(self, lm: "PreTrainedModel", cache: KvCache, context_length: int):
        attend_in_pages(lm)
        pack_linears(lm)
        self._lm = lm
        self._cache = cache
        self._rope = RopeOfLine.of(lm, context_length)

    def rope_of(self, limit: int) -> Rope:
        """As `Step`."""
        return self._rope.kind(limit)

    @torch.inference_mode()
    def __call__(self, embeddings: Tensor, layout: StepLayout, ropes: Sequence[Rope]) -> Tensor:
        """As `Step`."""
        self._rope.tell(ropes, layout.rows)
        inputs: dict[str, Any] = {
            "inputs_embeds": embeddings.unsqueeze(0),  # (1, t, d_model)
            "position_ids": layout.positions.unsqueeze(0),
            "paging": Paging(self._cache, layout),
        }
        return self._lm(**inputs, use_cache=False, logits_to_keep=layout.last).logits[0]  # (n_last, vocab)


def step_of(lm: "PreTrainedModel", cache: KvCache, context_length: int) -> Step:
    """The fastest step that there is for an LM.

    Raises:
        ConfigError: as `PlainStep`.
    """
    return (LeanStep if is_lean(lm) else PlainStep)(lm, cache, context_length)
