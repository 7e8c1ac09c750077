"""Logits of a step -> the next token of each of its sequences.

Each row is treated by its own parameters and its own generator, of which every token takes one number: so what a seed
gives does not depend on the other rows. Does not know pages or text.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmllm_core.engine.grammar import Grammar
from mmllm_core.engine.protocol import SamplingParams, TokenLogprob

CANDIDATES = 1024
"""How many of the likeliest tokens are sorted; all, where these do not suffice."""


@dataclass(eq=False)
class SamplingState:
    """What one answer's tokens are chosen by.

    Args:
        params: of the request.
        index: which of the `n` answers.
        prompt: token ids in the prompt, as far as they are known.
        stop_ids: that `min_tokens` holds back; an answer that is bound to a grammar ends when it is whole.
        grammar: that the answer keeps to.
    """

    params: SamplingParams
    index: int = 0
    prompt: frozenset[int] = frozenset()
    stop_ids: Sequence[int] = ()
    grammar: Grammar | None = None
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token is in the answer."""
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((self.params.seed + self.index) % 2**63)

    @property
    def changes_logits(self) -> bool:
        """Whether the LM's logits are not what is chosen from."""
        p = self.params
        penalised = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        return bool(penalised) or self._holds_back or self.grammar is not None

    @property
    def _holds_back(self) -> bool:
        return self.counts.total() < self.params.min_tokens and bool(self.stop_ids) and self.grammar is None

    def change(self, logits: Tensor) -> None:
        """Apply penalties to logits (vocab,), and strike out what may not come next; in place."""
        p = self.params
        if p.repetition_penalty != 1 and (seen := sorted(self.prompt | self.counts.keys())):
            ids = torch.tensor(seen, device=logits.device)
            old = logits[ids]
            logits[ids] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
        if self.counts and (p.presence_penalty or p.frequency_penalty):
            ids = torch.tensor(list(self.counts), device=logits.device)
            times = torch.tensor(list(self.counts.values()), device=logits.device)
            logits[ids] -= p.presence_penalty + p.frequency_penalty * times
        if self._holds_back:
            logits[list(self.stop_ids)] = -torch.inf
        if self.grammar is not None:
            self.grammar.mask(logits)

    def take(self, token: int) -> None:
        """Note the token that was chosen."""
        self.counts[token] += 1
        if self.grammar is not None:
            self.grammar.accept(token)


@dataclass(frozen=True)
class Choice:
    """A token, and how likely it was where that was asked for."""

    token: int
    logprob: TokenLogprob | None = None


@torch.inference_mode()
def choose(logits: Tensor, states: Sequence[SamplingState]) -> list[Choice | None]:
    """Choose a token for each row of logits (n, vocab); None where a row is not finite."""
    original = logits.float()
    changed = [i for i, state in enumerate(states) if state.changes_logits]
    scores = original.clone() if changed else original
    for i in changed:
        states[i].change(scores[i])
    best, greedy = scores.max(-1)  # NaN is the maximum of a row that has one
    tokens, finite = greedy.tolist(), best.isfinite().tolist()
    sampled = [i for i, state in enumerate(states) if state.params.temperature > 0 and finite[i]]
    if sampled:
        for i, token in zip(sampled, _sample(scores[sampled], [states[i] for i in sampled]), strict=True):
            tokens[i] = token
    choices: list[Choice | None] = []
    for i, state in enumerate(states):
        if not finite[i]:
            choices.append(None)
            continue
        state.take(tokens[i])
        n = state.params.logprobs
        choices.append(Choice(tokens[i], None if n is None else _logprob(original[i], tokens[i], n)))
    return choices


def _sample(scores: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """Token ids by the inverse of the distribution function, likeliest tokens first, from scores (n, vocab)."""
    params = [state.params for state in states]
    device = scores.device
    scores = scores / torch.tensor([p.temperature for p in params], device=device)[:, None]
    total = scores.logsumexp(-1, keepdim=True)
    uniform = torch.stack([torch.rand(1, generator=s.generator, dtype=torch.float64) for s in states]).to(device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)[:, None]
    top_k = torch.tensor([p.top_k or scores.shape[1] for p in params], device=device)[:, None]
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=device)[:, None]
    n = min(CANDIDATES, scores.shape[1])
    while True:
        values, ids = scores.topk(n)  # (n_rows, n)
        likely = (values - total).double().exp()
        ahead = likely.cumsum(-1) - likely  # probability of all that are likelier
        keeps = (
            ((ahead < top_p) | (ahead == 0))
            & (torch.arange(n, device=device) < top_k)
            & (likely >= min_p * likely[:, :1])
        )
        if n == scores.shape[1] or not bool(keeps[:, -1].any()):
            break
        n = scores.shape[1]  # the last candidate is kept, and so others may be
    likely = likely * keeps
    cumulated = likely.cumsum(-1)
    at = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
    return ids.gather(1, at.minimum(keeps.sum(-1, keepdim=True) - 1))[:, 0].tolist()


def _logprob(logits: Tensor, token: int, n: int) -> TokenLogprob:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
