"""One step of an LM over a line of positions: embeddings -> logits, keys and values into the cache.

`PlainStep` is transformers' own forward pass, for every LM whose attention can be paged, quantized or adapted as it may
be; some have a faster one (`mmllm_core.engine.lean_step`), all others a slower (`mmllm_core.engine.unpaged_step`). Does
not know requests or sampling.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mmllm_core.engine.lean_step import LeanStep, is_lean
from mmllm_core.engine.lora import LineAdapters, adapt_linears
from mmllm_core.engine.packed_linear import pack_linears
from mmllm_core.engine.paged_attention import KvCache, Paging, StepLayout, attend_in_pages
from mmllm_core.engine.rope import Rope, RopeOfLine
from mmllm_core.engine.unpaged_step import UnpagedStep
from mmllm_core.errors import ConfigError
from mmllm_core.packed_attention import PACKABLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Step(Protocol):
    """Advances all sequences of a layout at once."""

    shares_prefixes: bool
    """Whether a sequence may go on from pages that another has computed."""

    def rope_of(self, limit: int) -> Rope:
        """How to tell positions of a sequence that may take so many, from its first to its last."""
        ...

    def release(self, page: int) -> None:
        """Forget the sequence whose first page it is, for it has ended."""
        ...

    def __call__(self, embeddings: Tensor, layout: StepLayout, ropes: Sequence[Rope]) -> Tensor:
        """Compute a line of embeddings (t, d_model), write its keys and values, and give logits (n_last, vocab)."""
        ...


class PlainStep:
    """The LM's own forward pass, with its linear layers packed where they can be.

    Raises:
        ConfigError: the LM's attention cannot be paged, or how it tells positions depends on what else is computed.
    """

    shares_prefixes = True

    def __init__(
        self, lm: "PreTrainedModel", cache: KvCache, context_length: int, adapters: LineAdapters | None = None
    ):
        attend_in_pages(lm)
        pack_linears(lm)
        if adapters is not None:
            adapt_linears(lm, adapters)
        self._lm = lm
        self._cache = cache
        self._rope = RopeOfLine.of(lm, context_length)

    def rope_of(self, limit: int) -> Rope:
        """As `Step`."""
        return self._rope.kind(limit)

    def release(self, page: int) -> None:
        """As `Step`: all is in the cache."""

    @torch.inference_mode()
    def __call__(self, embeddings: Tensor, layout: StepLayout, ropes: Sequence[Rope]) -> Tensor:
        """As `Step`."""
        self._rope.tell(ropes, layout.rows)
        inputs: dict[str, Any] = {
            "inputs_embeds": embeddings.unsqueeze(0),  # (1, t, d_model)
            "position_ids": layout.positions.unsqueeze(0),
            "paging": Paging(self._cache, layout),
        }
        logits: Tensor = self._lm(**inputs, use_cache=False, logits_to_keep=layout.last).logits[0]  # (n_last, vocab)
        return logits


def step_of(lm: "PreTrainedModel", n_pages: int, context_length: int, adapters: LineAdapters | None = None) -> Step:
    """The fastest step that there is for an LM, with a cache of its own.

    Args:
        adapters: whose the positions of each line are, where they may have several adapters.

    Raises:
        ConfigError: as `PlainStep`; or adapters for an LM whose attention is not known.
    """
    if lm.config.model_type not in PACKABLE:
        if adapters is not None:
            raise ConfigError(
                f"phi.adapters: '{lm.config.model_type}' is computed one sequence after another: serve "
                "each bundle by itself"
            )
        return UnpagedStep(lm)
    weight = lm.get_input_embeddings().weight
    cache = KvCache(*kv_shape(lm.config), n_pages, weight.dtype, weight.device)
    return (LeanStep if is_lean(lm) else PlainStep)(lm, cache, context_length, adapters)


def kv_shape(config: Any) -> tuple[int, int, int]:
    """An LM's number of layers, its heads of keys and values, and how wide they are."""
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return config.num_hidden_layers, n_kv_heads, head_dim
