"""lmms-eval is asked for what was meant, and what it says is read; its own run is tested in tests/serve_apps."""

import json
import os
from pathlib import Path

import pytest

from mmllm_core.errors import ConfigError, EnvironmentLack, MmllmError
from train_jobs.benchmarks import (
    PROGRAM_VARIABLE,
    BenchmarkRun,
    BenchmarkScore,
    command,
    find_program,
    read_scores,
    run_benchmarks,
)

RESULTS = {
    "results": {
        "easy_vqa_small": {
            "alias": "easy_vqa_small",
            "exact_match,none": 0.75,
            "exact_match_stderr,none": 0.13,
            "exact_match_stderr_clt,none": 0.13,
            "exact_match_stderr_clustered,none": "N/A",
        },
        "pope": {
            "alias": "pope",
            "pope_accuracy,none": 0.5,
            "pope_accuracy_stderr,none": "N/A",
            "pope_f1_score,none": 0.25,
            "submission,none": None,
        },
    },
    "n-samples": {"easy_vqa_small": {"original": 12, "effective": 8}},
}
"""As lmms-eval 0.7.3 writes them."""


def program(folder: Path, script: str) -> Path:
    """A program in lmms-eval's place, to end as lmms-eval may end."""
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def writes(folder: Path, answers: list[object]) -> str:
    """A script that leaves results and these answers in the folder for its output."""
    (folder / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    lines = "\n".join(json.dumps({"doc_id": i, "filtered_resps": answer}) for i, answer in enumerate(answers))
    (folder / "samples.jsonl").write_text(lines + "\n", encoding="utf-8")
    return (
        'while [ "$1" != --output_path ]; do shift; done; mkdir "$2/tiny"; '
        f'cp {folder}/results.json "$2/tiny/1_results.json"; cp {folder}/samples.jsonl "$2/tiny/1_samples_pope.jsonl"'
    )


def test_the_service_is_asked_for_the_suites_meant() -> None:
    run = BenchmarkRun(("vqav2", "mmbench", "mine"), "http://127.0.0.1:8000/", "tiny", 5, 3, Path("tasks"))
    words = command(run, Path("lmms-eval"), Path("out"))
    options = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
    assert words[:2] == ["lmms-eval", "eval"]
    assert words[-1] == "--log_samples"
    assert options["--tasks"] == "vqav2_val,mmbench_en_dev_static,mine"
    model_args = "model_version=tiny,base_url=http://127.0.0.1:8000/v1,api_key=local,num_concurrent=3"
    assert options["--model_args"] == model_args
    assert (options["--limit"], options["--include_path"], options["--output_path"]) == ("5", "tasks", "out")
    assert "--limit" not in command(BenchmarkRun(("pope",), "http://h", "tiny"), Path("p"), Path("out"))


@pytest.mark.parametrize(
    ("tasks", "url", "named"), [((), "http://h", "vqav2"), (("a,b",), "http://h", "a,b"), (("a",), "http://h,x", "h,x")]
)
def test_what_lmms_eval_would_misread_is_refused(tasks: tuple[str, ...], url: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        command(BenchmarkRun(tasks, url, "tiny"), Path("p"), Path("out"))


def test_scores_are_numbers_with_their_errors(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    assert read_scores(tmp_path / "results.json") == [
        BenchmarkScore("easy_vqa_small", "exact_match", 0.75, 0.13, 8),
        BenchmarkScore("pope", "pope_accuracy", 0.5, None, None),
        BenchmarkScore("pope", "pope_f1_score", 0.25, None, None),
    ]


def test_scores_come_back_where_all_was_answered(tmp_path: Path) -> None:
    made = program(tmp_path, writes(tmp_path, ["yes", ["no"], [["a"]]]))
    scores = run_benchmarks(BenchmarkRun(("pope",), "http://h", "tiny"), made, tmp_path / "out")
    assert [score.metric for score in scores] == ["exact_match", "pope_accuracy", "pope_f1_score"]


def test_a_question_without_an_answer_is_never_counted_as_wrong(tmp_path: Path) -> None:
    failed = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] Error code: 404"
    made = program(tmp_path, writes(tmp_path, ["yes", failed, [failed]]))
    with pytest.raises(MmllmError, match="without an answer: 2") as caught:
        run_benchmarks(BenchmarkRun(("pope",), "http://h", "tiny"), made, tmp_path / "out")
    assert "404" in str(caught.value)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            "echo all well; printf '\\033[31mError during evaluation: no such task. Please set X\\033[0m\\n'",
            "no such task",
        ),
        ("echo 'Error during evaluation: RetryError[LocalTokenNotFoundError]. Please set X'", "hf auth login"),
        ("echo last words; exit 3", "last words"),
        ("exit 1", "it said nothing"),
    ],
)
def test_a_run_without_results_says_why_in_a_line(script: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(MmllmError, match=told) as caught:
        run_benchmarks(BenchmarkRun(("pope",), "http://h", "tiny"), program(tmp_path, script), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "Please set" not in str(caught.value)
    assert str(tmp_path / "out" / "lmms-eval.log") in str(caught.value)


def test_the_program_is_that_of_the_option_the_variable_or_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, named, found = (tmp_path / name for name in ("given", "named", "lmms-eval"))
    for path in (given, named, found):
        path.write_text("#!/bin/sh\n", encoding="utf-8")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(PROGRAM_VARIABLE, str(named))
    assert find_program(given) == given
    assert find_program() == named
    monkeypatch.delenv(PROGRAM_VARIABLE)
    assert find_program() == found
    found.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentLack, match="pip install 'lmms-eval=="):
        find_program()
    with pytest.raises(EnvironmentLack, match="nowhere"):
        find_program(tmp_path / "nowhere")
