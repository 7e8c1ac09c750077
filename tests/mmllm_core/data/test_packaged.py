"""The conversations that come with mmllm."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mmllm_core.config import ChatData, DataConfig
from mmllm_core.data.json_rows import read_rows
from mmllm_core.data.lint import LintOptions, lint
from mmllm_core.data.mixture import training_samples
from mmllm_core.data.record import Record
from mmllm_core.data.text import chat_record
from mmllm_core.data.token_count import Rendering
from mmllm_core.evaluation.accuracy import normalise
from mmllm_core.evaluation.text_ability import text_set

PLAIN_CHAT = ChatData(file=Path("$MMLLM_DATA/plain_chat.jsonl"))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [chat_record(row.value) for row in read_rows(PLAIN_CHAT.file)]


def runs(text: str, n: int) -> set[tuple[str, ...]]:
    """Every n words of a text that follow each other."""
    words = normalise(text).split()
    return {tuple(words[at : at + n]) for at in range(len(words) - n + 1)}


def test_plain_chat_lints_clean(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    rendering = Rendering(tmp_path, n_image_tokens=1, max_length=2048)
    report = lint(PLAIN_CHAT.file, LintOptions(images=tmp_path, rendering=rendering, workers=1))
    assert report.clean, report.findings
    assert report.rows > 300


def test_plain_chat_answers_prompts_of_its_list_once_each(records: list[Record]) -> None:
    asked = [record.turns[0].text for record in records]
    listed = PLAIN_CHAT.file.with_name("plain_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in listed if line in set(asked)] == asked
    assert len({record.id for record in records}) == len(records)
    assert all([turn.role for turn in record.turns] == ["user", "assistant"] for record in records)


def test_nothing_of_plain_chat_is_asked_or_read_in_the_test_of_text_ability(records: list[Record]) -> None:
    questions = [f" {normalise(question.question)} " for question in text_set().questions]
    prose = set().union(*(runs(paragraph, 6) for paragraph in text_set().prose))
    for record in records:
        for turn in record.turns:
            said = f" {normalise(turn.text)} "
            assert not any(question in said for question in questions), record.id
        assert not runs(record.turns[0].text, 6) & prose, record.id


def test_plain_chat_can_be_trained_on() -> None:
    samples = list(islice(training_samples(DataConfig(sources=(PLAIN_CHAT,)), 0), 3))
    assert len({sample.id for sample in samples}) == 3
    assert all(not sample.images for sample in samples)
