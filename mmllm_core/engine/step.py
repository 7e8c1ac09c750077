"""One step of an LM over a line of positions: embeddings -> logits, keys and values into the cache.

`PlainStep` is transformers' own forward pass, for every LM whose attention can be paged, quantized or adapted as it may
be. Does not know requests or sampling.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mmllm_core.engine.paged_attention import KvCache, Paging, StepLayout, attend_in_pages

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Step(Protocol):
    """Advances all sequences of a layout at once."""

    def __call__(self, embeddings: Tensor, layout: StepLayout) -> Tensor:
        """Compute a line of embeddings (t, d_model), write its keys and values, and give logits (n_last, vocab)."""
        ...


class PlainStep:
    """The LM's own forward pass.

    Raises:
        ConfigError: the LM's attention cannot be paged.
    """

    def __init__(self, lm: "PreTrainedModel", cache: KvCache):
        self._lm = lm
        self._cache = cache
        attend_in_pages(lm)

    @torch.inference_mode()
    def __call__(self, embeddings: Tensor, layout: StepLayout) -> Tensor:
        """As `Step`."""
        inputs: dict[str, Any] = {
            "inputs_embeds": embeddings.unsqueeze(0),  # (1, t, d_model)
            "position_ids": layout.positions.unsqueeze(0),
            "paging": Paging(self._cache, layout),
        }
        return self._lm(**inputs, use_cache=False, logits_to_keep=layout.last).logits[0]  # (n_last, vocab)
