"""Questions of one's own, read from a file in LLaVA's format."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmllm_core.errors import DataError
from mmllm_core.evaluation.accuracy import commonest_answer_baseline, score_by_kind
from mmllm_core.evaluation.file_questions import file_questions


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "asked.json"
    path.write_text(json.dumps(rows))
    return path


def row(image: Any, *turns: str) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "a", "image": image, "conversations": said}


def test_every_answer_is_a_question_of_its_own(tmp_path: Path) -> None:
    rows = row("x.png", "<image>\nwhat colour?", "red", "what shape?", "circle"), row("y.png", "what?\n<image>", "red")
    questions = file_questions(write(tmp_path, *rows))
    assert [(q.image.name, q.question, q.answer) for q in questions] == [
        ("x.png", "what colour?", "red"),
        ("x.png", "what shape?", "circle"),
        ("y.png", "what?", "red"),
    ]
    assert len({q.id for q in questions}) == 3
    assert questions[0].image == tmp_path / "x.png"
    assert file_questions(tmp_path / "asked.json", Path("/elsewhere"))[0].image == Path("/elsewhere/x.png")


def test_what_stood_before_a_question_is_not_its_answer(tmp_path: Path) -> None:
    system = {"from": "system", "value": "Be brief."}
    asked = row("x.png", "<image>\nwhat colour?", "red")
    (question,) = file_questions(write(tmp_path, asked | {"conversations": [system, *asked["conversations"]]}))
    assert (question.question, question.answer) == ("what colour?", "red")


def test_scores_are_of_all_together(tmp_path: Path) -> None:
    rows = row("x.png", "<image>\na?", "red", "b?", "red"), row("x.png", "<image>\nc?", "blue")
    questions = file_questions(write(tmp_path, *rows))
    assert {kind: (s.right, s.asked) for kind, s in score_by_kind(questions, ["Red.", "blue", "blue"]).items()} == {
        "all": (2, 3)
    }
    assert commonest_answer_baseline(questions)["all"].right == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (row(["x.png", "y.png"], "<image><image>\nwhich?", "both"), "has 2 images"),
        ({"id": "a", "conversations": row("x", "hello", "hi")["conversations"]}, "has 0 images"),
        (row("x.png", "<image>\nwhat?"), "turn order"),
        ({"messages": [{"role": "user", "content": "a"}]}, "is not in LLaVA's format"),
    ],
)
def test_a_file_that_holds_no_such_questions_is_refused_by_name(
    value: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"asked\.json: .*{message}"):
        file_questions(write(tmp_path, value))
