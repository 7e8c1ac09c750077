"""How positions are told in a line of several sequences.

LMs with LongRoPE tell positions in one way up to the length that they were first trained on, and in another beyond
(arXiv:2402.13753). transformers chooses by the furthest position of all that it computes at once; here each sequence
is told in one way from its first position to its last, whatever it is computed with.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mmllm_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rope = Literal["near", "far"]


class RopeOfLine(nn.Module):
    """Stands in for an LM's rotary embedding.

    Args:
        rope: the LM's own.
        near_length: positions of the longest sequence that is told the near way; None where there is but one way.
    """

    def __init__(self, rope: nn.Module, near_length: int | None):
        super().__init__()
        self._rope = rope
        self._near_length = near_length
        self._far: Tensor | None = None  # bool (t,)

    @classmethod
    def of(cls, lm: "PreTrainedModel", context_length: int) -> "RopeOfLine":
        """That of an LM, which goes by it from now on if its own would not do.

        Raises:
            ConfigError: positions so far are told by what else is computed with them (dynamic RoPE).
        """
        parameters = getattr(lm.config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type")
        longest = parameters.get("original_max_position_embeddings") or lm.config.max_position_embeddings
        beyond = context_length > longest
        if kind == "dynamic" and beyond:
            raise ConfigError(
                f"context_length: {context_length}, and this LM tells positions beyond {longest} by the longest "
                f"sequence that is computed with them (dynamic RoPE): lower it to {longest}"
            )
        rope = cls(lm.base_model.rotary_emb, longest if kind == "longrope" and beyond else None)
        if rope._near_length is not None:
            lm.base_model.rotary_emb = rope
        return rope

    def kind(self, limit: int) -> Rope:
        """How to tell positions of a sequence that may take so many."""
        return "far" if self._near_length is not None and limit > self._near_length else "near"

    def tell(self, ropes: Sequence[Rope], rows: Tensor) -> None:
        """Say how the positions of the next line are told.

        Args:
            ropes: of each sequence.
            rows: int64 (t,), the sequence of each position.
        """
        far = [rope == "far" for rope in ropes]
        self._far = torch.tensor(far, device=rows.device)[rows] if any(far) else None

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, t, d) of positions (1, t)."""
        if self._near_length is None:
            told: tuple[Tensor, Tensor] = self._rope(x, position_ids)
            return told
        near: tuple[Tensor, Tensor] = self._rope(x, position_ids.clamp(max=self._near_length - 1))
        if self._far is None:
            return near
        beyond = position_ids.new_full((1, 1), self._near_length)
        far = self._rope(x, torch.cat([position_ids, beyond], 1))
        is_far = self._far[None, :, None]
        return torch.where(is_far, far[0][:, :-1], near[0]), torch.where(is_far, far[1][:, :-1], near[1])
