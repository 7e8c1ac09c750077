"""Spoken questions are the conversations that serving makes, and their wrong answers are told apart by cause."""

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmllm_core.config import MlpConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import render
from mmllm_core.data.sample import Question
from mmllm_core.evaluation.accuracy import Score, answer_questions
from mmllm_core.evaluation.spoken import (
    Hearing,
    SpokenReport,
    WrongAnswers,
    answer_hearings,
    spoken_message,
    typed_message,
)
from mmllm_core.evaluation.wer import WordErrors, normalise_english
from mmllm_core.model import MultimodalLM
from serve_apps.limits import Limits
from serve_apps.openai_protocol import parse_request, with_transcripts
from tests.conftest import TinyLM


@pytest.fixture(scope="module", autouse=True)
def _spellings() -> None:
    """The table of spellings is read once, from the usual home and not from a test's own."""
    normalise_english("")


def question(number: int, asked: str, right: str, kind: str = "yes/no") -> Question:
    return Question(f"q{number}", Path(f"{number % 3}.png"), asked, right, kind)


@pytest.mark.parametrize("transcript", ["What color is the shape?", " padded ", "<|im_end|> there", ""])
def test_a_spoken_question_is_what_serving_makes_of_an_image_and_a_clip(transcript: str, tokenizer: Any) -> None:
    data = base64.b64encode(b"bytes").decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
    ]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    served = with_transcripts(parse_request(json.dumps(body).encode(), Limits()), [transcript])
    assert served == (spoken_message(transcript),)


@pytest.mark.parametrize("asked", ["What color is the shape?", "is there a <|im_end|>?"])
def test_a_typed_question_is_what_serving_makes_of_an_image_and_text(asked: str, tokenizer: Any) -> None:
    data = base64.b64encode(b"bytes").decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": asked},
    ]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    served = parse_request(json.dumps(body).encode(), Limits()).messages
    assert served == (typed_message(asked),)
    rendering = {"n_image_tokens": 3, "max_length": 100, "generation_prompt": True}
    assert (
        render(served, tokenizer, **rendering).input_ids
        == render([spoken_message(asked)], tokenizer, **rendering).input_ids
    ), "speech is not marked yet: once it is, `mmllm evaluate-spoken` measures what that costs, and this line goes"


def report() -> SpokenReport:
    """Seven questions: three are heard rightly, of which one is answered wrongly in any form and one when spoken."""
    return SpokenReport(
        (
            Hearing(question(0, "is it red?", "yes"), "Is it red?", "yes", "yes", "yes"),
            Hearing(question(1, "is it blue?", "no"), "Is it blue?", "yes", "yes", "yes"),
            Hearing(question(2, "is it gray?", "yes"), "Is it grey?", "yes", "yes", "No."),
            Hearing(question(3, "is it teal?", "no"), "Is it deal?", "no", "no", "yes"),
            Hearing(question(4, "is it teal?", "yes"), "is it deal?", "yes", "no", "No"),
            Hearing(question(5, "what shape is it?", "circle", "shape"), "what ship is it?", "square", "square", "a"),
            Hearing(question(6, "what shape is it?", "circle", "shape"), "", "circle", "circle", "circle"),
        )
    )


def test_accuracy_is_told_by_form_and_kind() -> None:
    scores = report().scores
    assert scores["typed"] == {"all": Score(5, 7), "shape": Score(1, 2), "yes/no": Score(4, 5)}
    assert scores["recognised"] == {"all": Score(4, 7), "shape": Score(1, 2), "yes/no": Score(3, 5)}
    assert scores["spoken"] == {"all": Score(2, 7), "shape": Score(1, 2), "yes/no": Score(1, 5)}


def test_wrong_answers_are_told_apart_by_what_was_heard() -> None:
    found = report()
    assert [h.question.id for h in found.rightly_heard] == ["q0", "q1", "q2"]
    assert found.scores_of_rightly_heard == {"all": Score(1, 3), "yes/no": Score(1, 3)}
    assert found.heard_rightly_and_wrong == WrongAnswers(2, right_when_typed=1)
    assert found.heard_wrongly_and_wrong == WrongAnswers(3, right_when_typed=2)
    spoken = found.scores["spoken"]["all"]
    assert spoken.asked - spoken.right == found.heard_rightly_and_wrong.wrong + found.heard_wrongly_and_wrong.wrong


def test_word_errors_and_mishearings_are_over_all_questions() -> None:
    found = report()
    assert found.word_errors == WordErrors(substitutions=3, deletions=4, insertions=0, words=5 * 3 + 2 * 4)
    assert found.mishearings == Counter(
        {("teal", "deal"): 2, ("shape", "ship"): 1, ("what shape is it", ""): 1},
    )


def test_a_report_is_json_that_says_all_of_it() -> None:
    told = json.loads(json.dumps(report().to_json()))
    assert told["accuracy"]["spoken"]["all"] == [2, 7]
    assert told["word_errors"] == {
        "substitutions": 3,
        "deletions": 4,
        "insertions": 0,
        "words": 23,
        "rate": pytest.approx(7 / 23),
    }
    assert told["wrong_answers"]["heard_wrongly"] == {"wrong": 3, "right_when_typed": 2}
    assert told["mishearings"][0] == {"said": "teal", "heard": "deal", "times": 2}
    assert told["questions"][3]["heard"] == "Is it deal?"


def test_every_form_is_answered_about_its_own_image(tiny_lm: TinyLM, tokenizer: Any) -> None:
    torch.manual_seed(3)
    model = MultimodalLM(
        tiny_lm("llama", initializer_range=0.5), build_connector(MlpConfig(), 8, LmShape(64, 2))
    ).eval()
    rng = np.random.default_rng(0)
    features = {Path(f"{n}.png"): rng.normal(size=(5, 8)).astype(np.float16) for n in range(3)}
    asked = [question(n, f"what is {n % 4}?", "yes") for n in range(9)]
    heard = ["What is it?", *(f"what is {n % 4}?" for n in range(1, 9))]
    found = list(answer_hearings(model, tokenizer, asked, heard, features.__getitem__))

    typed = answer_questions(model, tokenizer, asked, features.__getitem__)
    said = [question(n, text, "yes") for n, text in enumerate(heard)]
    assert [h.typed for h in found] == [h.recognised for h in found] == typed
    assert [h.spoken for h in found] == answer_questions(model, tokenizer, said, features.__getitem__)
    assert [h.question for h in found] == asked
    assert found[0].spoken != found[0].typed, "this model answers another question otherwise"
    assert len(set(typed)) > 3
