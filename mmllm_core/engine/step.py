"""One step of an LM over a line of positions: embeddings -> logits, keys and values into the cache.

`PlainStep` is transformers' own forward pass, for every LM whose attention can be paged, quantized or adapted as it may
be. Does not know requests or sampling.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mmllm_core.engine.paged_attention import KvCache, Paging, StepLayout, attend_in_pages
from mmllm_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rope = Literal["near", "far"]
"""How positions are told: LMs with LongRoPE do it in one way up to the length that they were first trained on, and in
another beyond (arXiv:2402.13753)."""


class Step(Protocol):
    """Advances all sequences of a layout at once."""

    def rope_of(self, limit: int) -> Rope:
        """How to tell positions of a sequence that may take so many, from its first to its last."""
        ...

    def __call__(self, embeddings: Tensor, layout: StepLayout, ropes: Sequence[Rope]) -> Tensor:
        """Compute a line of embeddings (t, d_model), write its keys and values, and give logits (n_last, vocab)."""
        ...


class PlainStep:
    """The LM's own forward pass.

    Raises:
        ConfigError: the LM's attention cannot be paged, or how it tells positions depends on what else is computed.
    """

    def __init__(self, lm: "PreTrainedModel", cache: KvCache, context_length: int):
        self._lm = lm
        self._cache = cache
        self._long_rope = _long_rope(lm, context_length)
        attend_in_pages(lm)

    def rope_of(self, limit: int) -> Rope:
        """As `Step`."""
        return "far" if self._long_rope is not None and limit > self._long_rope.near_length else "near"

    @torch.inference_mode()
    def __call__(self, embeddings: Tensor, layout: StepLayout, ropes: Sequence[Rope]) -> Tensor:
        """As `Step`."""
        if self._long_rope is not None:
            far = torch.tensor([rope == "far" for rope in ropes], device=embeddings.device)
            self._long_rope.far = far[layout.rows]
        inputs: dict[str, Any] = {
            "inputs_embeds": embeddings.unsqueeze(0),  # (1, t, d_model)
            "position_ids": layout.positions.unsqueeze(0),
            "paging": Paging(self._cache, layout),
        }
        return self._lm(**inputs, use_cache=False, logits_to_keep=layout.last).logits[0]  # (n_last, vocab)


class LongRope(nn.Module):
    """LongRoPE for a line of sequences, each of which is told in its own way.

    transformers' own takes one way for all that it is given at once, by the furthest position among them.
    """

    def __init__(self, rope: nn.Module, near_length: int):
        super().__init__()
        self._rope = rope
        self.near_length = near_length
        self.far: Tensor | None = None
        """bool (t,): which positions of the line to tell by the far way."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, t, d) of positions (1, t)."""
        near = self._rope(x, position_ids.clamp(max=self.near_length - 1))
        beyond = position_ids.new_full((1, 1), self.near_length)
        far = self._rope(x, torch.cat([position_ids, beyond], 1))
        assert self.far is not None
        is_far = self.far[None, :, None]
        return torch.where(is_far, far[0][:, :-1], near[0]), torch.where(is_far, far[1][:, :-1], near[1])


def _long_rope(lm: "PreTrainedModel", context_length: int) -> LongRope | None:
    """Put a `LongRope` into an LM whose context goes beyond what it was first trained on; None if it needs none."""
    parameters = getattr(lm.config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type")
    longest = parameters.get("original_max_position_embeddings") or lm.config.max_position_embeddings
    if kind not in ("longrope", "dynamic") or context_length <= longest:
        return None
    if kind == "dynamic":
        raise ConfigError(
            f"context_length: {context_length}, and this LM tells positions beyond {longest} by the longest sequence "
            f"that is computed with them (dynamic RoPE): lower it to {longest}"
        )
    lm.base_model.rotary_emb = LongRope(lm.base_model.rotary_emb, longest)
    return lm.base_model.rotary_emb
