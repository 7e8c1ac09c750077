"""A step of any LM, by its own forward pass and its own cache, one sequence after another.

For LMs whose attention is not known to be ours: slower than pages, and nothing is shared between prompts. Sequences
are told apart by the first of their pages, which no other has then. Does not know requests or sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm_core.engine.paged_attention import StepLayout
from mmllm_core.engine.rope import Rope

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Computed:
    """What there is of a sequence."""

    cache: Any
    n: int
    logits: Tensor  # (vocab,) of its last position


class UnpagedStep:
    """As `mmllm_core.engine.step.Step`."""

    shares_prefixes = False

    def __init__(self, lm: "PreTrainedModel"):
        self._lm = lm
        self._computed: dict[int, _Computed] = {}

    def rope_of(self, limit: int) -> Rope:
        """As `Step`; the LM tells positions by the length of each sequence so far."""
        return "near"

    def release(self, page: int) -> None:
        """As `Step`."""
        self._computed.pop(page, None)

    @torch.inference_mode()
    def __call__(self, embeddings: Tensor, layout: StepLayout, ropes: Sequence[Rope]) -> Tensor:
        """As `Step`."""
        spans = [(i, i, 1) for i in range(layout.n_decoding)]
        spans += [(chunk.row, chunk.begin, chunk.length) for chunk in layout.chunks]
        first_pages, asked = layout.pages[:, 0].tolist(), set(layout.last.tolist())
        logits = []
        for row, begin, length in spans:
            done = self._extend(first_pages[row], embeddings[begin : begin + length], int(layout.lengths[row]))
            if begin + length - 1 in asked:
                logits.append(done)
        return torch.stack(logits) if logits else embeddings.new_zeros(0, self._lm.config.vocab_size)

    def _extend(self, page: int, embeddings: Tensor, length: int) -> Tensor:
        """Logits (vocab,) of the last of `length` positions, of which embeddings (n, d_model) are the last."""
        before = self._computed.get(page)
        if before is not None and before.n == length:  # a step that failed at another sequence is tried again
            return before.logits
        start = length - len(embeddings)
        if start != (before.n if before else 0):
            raise RuntimeError(f"{start} positions should be computed, and {before.n if before else 0} are")
        positions = torch.arange(start, length, device=embeddings.device)
        out = self._lm(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            past_key_values=before.cache if before else None,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[0, -1]  # (vocab,)
        self._computed[page] = _Computed(out.past_key_values, length, logits)
        return logits
