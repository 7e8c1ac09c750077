"""Answering questions, and scoring the answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmllm_core.config import MlpConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.data.sample import Question
from mmllm_core.evaluation.accuracy import (
    Score,
    answer_questions,
    commonest_answer_baseline,
    normalise,
    score_by_kind,
    scores_from_json,
    scores_to_json,
)
from mmllm_core.model import MultimodalLM
from tests.conftest import TinyLM


def question(kind: str, answer: str) -> Question:
    return Question("q", Path("x.png"), "what?", answer, kind)


def test_scores_by_kind_and_baseline() -> None:
    questions = [
        question("colour", "red"),
        question("colour", "blue"),
        question("yes/no", "no"),
        question("colour", "red"),
    ]
    scores = score_by_kind(questions, ["Red.", "the blue", " NO ", "green"])
    assert {kind: (score.right, score.asked) for kind, score in scores.items()} == {
        "all": (2, 4),
        "colour": (1, 3),
        "yes/no": (1, 1),
    }
    baseline = commonest_answer_baseline(questions)
    assert baseline["colour"].right == 2


def test_normalising_keeps_words_alone() -> None:
    assert normalise("  A Blue-circle!\n") == "a blue circle"


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_newcombes_table_of_wilsons_method(
    right: int, asked: int, low: float, high: float
) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3."""
    assert Score(right, asked).interval == pytest.approx((low, high), abs=5e-5)


def test_an_interval_holds_the_accuracy_also_at_its_ends() -> None:
    assert Score(0, 0).interval == (0.0, 1.0)
    for asked in range(1, 60):
        for right in (0, 1, asked):
            low, high = Score(right, asked).interval
            assert 0 <= low <= right / asked <= high <= 1
            assert high - low < 1
    assert str(Score(9422, 9673)) == "97.4% (97.1-97.7)"


def test_scores_survive_json() -> None:
    scores = {"all": Score(3, 4), "shape": Score(0, 1)}
    assert scores_from_json(scores_to_json(scores)) == scores


def test_answers_come_in_order_and_are_the_models_own(tiny_lm: TinyLM, tokenizer: Any) -> None:
    model = MultimodalLM(tiny_lm("phi3"), build_connector(MlpConfig(), 8, LmShape(64, 2))).eval()
    texts = ["what is there?", "is there a circle?", "what?"]
    questions = [Question(str(i), Path(str(i)), text, "", "shape") for i, text in enumerate(texts)]
    features = {str(i): np.random.default_rng(i).normal(size=(5, 8)).astype(np.float16) for i in range(3)}

    def ask(max_positions: int) -> list[str]:
        return answer_questions(model, tokenizer, questions, lambda p: features[p.name], max_positions=max_positions)

    assert len(set(ask(1))) == 3
    assert ask(4096) == ask(1)
