"""lmms-eval's OpenAI client and our API understand each other.

Its packages do not go with our pins, so it lives in another environment, whose program MMLLM_TEST_LMMS_EVAL names.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mmllm_core.conversation import ImagePart, TextPart
from mmllm_core.data import easy_vqa
from mmllm_core.errors import MmllmError
from serve_apps.limits import Limits
from serve_apps.openai_protocol import parse_request
from tests.serve_apps.conftest import Service, data_uri, image_part, image_uri, text_part
from train_jobs.benchmarks import BenchmarkRun, run_benchmarks

TASK = """\
task: easy_vqa_few
dataset_path: parquet
dataset_kwargs:
  data_files: {test: FOLDER/easy_vqa.parquet}
test_split: test
output_type: generate_until
doc_to_visual: !function easy_vqa_docs.doc_to_visual
doc_to_text: !function easy_vqa_docs.doc_to_text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}
"""
DOCS = """\
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 16, "temperature": 0},
        {"max_tokens": 1024, "temperature": 0.0, "top_p": 1.0, "seed": 1, "n": 1},
        {"max_tokens": 8, "temperature": 0, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"response_format": {"type": "text"}, "max_completion_tokens": 16},  # of models with "o1" in their names
    ],
)
def test_the_bodies_that_it_sends_are_understood(fields: dict[str, Any]) -> None:
    content = [image_part(image_uri()), text_part("what color?\nAnswer the question using a single word or phrase.")]
    body = {"model": "demo1", "messages": [{"role": "user", "content": content}]} | fields
    call = parse_request(json.dumps(body).encode(), Limits())
    assert [type(part) for part in call.messages[0].parts] == [ImagePart, TextPart]
    assert call.sampling.temperature == 0
    assert call.sampling.max_tokens == fields.get("max_tokens", 16)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of four easy-VQA questions."""
    import datasets

    questions = easy_vqa.held_out_questions(easy_vqa.fetch(), 4)
    rows = [
        {"image": {"bytes": q.image.read_bytes(), "path": None}, "question": q.question, "answer": q.answer}
        for q in questions
    ]
    folder = tmp_path / "task"
    folder.mkdir()
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(folder / "easy_vqa.parquet")
    (folder / "easy_vqa_few.yaml").write_text(TASK.replace("FOLDER", str(folder)), encoding="utf-8")
    (folder / "easy_vqa_docs.py").write_text(DOCS, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def lmms_eval() -> Path:
    """Its program; sought before a service is started for it."""
    program = os.environ.get("MMLLM_TEST_LMMS_EVAL")
    if not program:
        pytest.skip("no lmms-eval: install lmms-eval elsewhere and name its program in MMLLM_TEST_LMMS_EVAL")
    return Path(program)


@pytest.mark.slow
def test_it_scores_a_served_assistant(lmms_eval: Path, service: Service, task: Path, tmp_path: Path) -> None:
    run = BenchmarkRun(("easy_vqa_few",), service.base_url, service.model, concurrent=2, own_tasks=task)
    [score] = run_benchmarks(run, lmms_eval, tmp_path / "out")
    assert (score.task, score.metric, score.asked) == ("easy_vqa_few", "exact_match", 4)
    samples = [json.loads(line) for p in (tmp_path / "out").rglob("*.jsonl") for line in p.read_text().splitlines()]
    asked = easy_vqa.held_out_questions(easy_vqa.fetch(), 4)
    assert [(s["input"], s["target"]) for s in samples] == [(q.question, q.answer) for q in asked]
    for question, sample in zip(asked, samples, strict=True):
        content = [image_part(data_uri(question.image.read_bytes())), text_part(question.question)]
        reply = service.client().chat.completions.create(**service.body(content, max_tokens=4))
        assert sample["filtered_resps"] == (reply.choices[0].message.content or "").strip(), (
            "it saw the image and had the answer"
        )
    assert score.value == sum(s["exact_match"] for s in samples) / 4


@pytest.mark.slow
def test_what_the_service_refuses_is_no_wrong_answer(
    lmms_eval: Path, service: Service, task: Path, tmp_path: Path
) -> None:
    run = BenchmarkRun(("easy_vqa_few",), service.base_url, "another-model", limit=1, own_tasks=task)
    with pytest.raises(MmllmError, match=r"without an answer: 1.*404"):
        run_benchmarks(run, lmms_eval, tmp_path / "out")
