"""Tokens are chosen as each request asks, whatever its neighbours ask."""

from collections import Counter
from typing import Any

import pytest
import torch

from mmllm_core.engine.protocol import SamplingParams
from mmllm_core.engine.sampler import CANDIDATES, Choice, SamplingState, choose


def state(stop_ids: tuple[int, ...] = (), prompt: frozenset[int] = frozenset(), **params: Any) -> SamplingState:
    return SamplingState(SamplingParams(**params), prompt=prompt, stop_ids=stop_ids)


def draw(logits: torch.Tensor, n: int, **params: Any) -> Counter[int]:
    """How often each token is chosen, by `n` seeds in one batch."""
    chosen = choose(logits.expand(n, -1), [state(seed=i, **params) for i in range(n)])
    return Counter(choice.token for choice in chosen if choice is not None)


def only(choices: list[Choice | None]) -> Choice:
    (choice,) = choices
    assert choice is not None
    return choice


@pytest.mark.parametrize("vocabulary", [5, 4 * CANDIDATES])
def test_samples_follow_the_distribution(vocabulary: int) -> None:
    probabilities = torch.zeros(vocabulary) + 1e-9
    probabilities[:5] = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
    found = draw(probabilities.log(), 4000, temperature=1.0)
    for token in range(5):
        assert found[token] / 4000 == pytest.approx(float(probabilities[token]), abs=0.03)
    colder = draw(probabilities.log(), 4000, temperature=0.5)
    assert colder[0] / 4000 == pytest.approx(0.25 / 0.3397, abs=0.03)  # squared and normalised


@pytest.mark.parametrize(
    ("params", "allowed"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0, 1}), ({"top_p": 0.49}, {0}), ({"min_p": 0.25}, {0, 1, 2})],
)
def test_what_is_struck_out_is_never_chosen(params: dict[str, Any], allowed: set[int]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04]).log()
    assert set(draw(logits, 500, temperature=1.0, **params)) == allowed


def test_a_flat_distribution_reaches_beyond_the_candidates() -> None:
    found = draw(torch.zeros(4 * CANDIDATES), 400, temperature=1.0, top_p=0.999)
    assert len(found) > 300
    assert len(draw(torch.zeros(4 * CANDIDATES), 400, temperature=1.0, top_k=3)) == 3


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    params: list[dict[str, Any]] = [
        {"temperature": 1.3, "seed": 1},
        {},
        {"temperature": 0.7, "top_p": 0.9, "seed": 2},
        {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.5, "seed": 3},
    ]
    together = choose(logits, [state(**p) for p in params])
    assert together == [choose(logits[i : i + 1], [state(**p)])[0] for i, p in enumerate(params)]


def test_penalties_lower_what_was_said() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -5.0]])
    assert only(choose(logits, [state(prompt=frozenset({0}), repetition_penalty=1.2)])).token == 1
    for penalty in ("presence_penalty", "frequency_penalty"):
        penalised = state(**{penalty: 0.3})
        assert [only(choose(logits, [penalised])).token for _ in range(2)] == [0, 1]
    often = state(frequency_penalty=1.0)
    assert [only(choose(logits, [often])).token for _ in range(4)] == [0, 1, 0, 1]
    assert logits.tolist()[0] == pytest.approx([2.0, 1.9, -1.0, -5.0])


def test_nothing_ends_an_answer_before_its_least_length() -> None:
    impatient = state(stop_ids=(0,), min_tokens=2)
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    assert [only(choose(logits, [impatient])).token for _ in range(3)] == [1, 1, 0]


def test_logprobs_are_those_of_the_lm() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    found = only(choose(logits, [state(logprobs=2, presence_penalty=1.0, temperature=1.0, top_k=1)])).logprob
    assert found is not None
    assert found.token_id == 0
    assert found.logprob == pytest.approx(-0.6931, abs=1e-3)
    assert found.top[0][0] == 0
    assert len(found.top) == 2


def test_a_row_that_is_not_finite_has_no_token() -> None:
    logits = torch.tensor([[1.0, float("nan")], [1.0, 2.0], [float("inf"), 0.0]])
    found = choose(logits, [state(), state(), state(temperature=1.0)])
    assert [None if choice is None else choice.token for choice in found] == [None, 1, None]
