"""`mmllm data` from the shell: exit codes, the table, the samples, one line when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FINE = {
    "id": "r-1",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat [bold]colour[/bold]?"},
        {"from": "gpt", "value": "Red."},
    ],
}
ENVIRONMENT = os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", "data", *arguments]
    environment = ENVIRONMENT | {"MMLLM_HOME": os.environ["MMLLM_HOME"]}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def options(tokenizer: Any, tmp_path: Path) -> list[str]:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return ["--tokenizer", str(tmp_path / "tokenizer"), "--max-length", "300"]


def test_easy_vqa_takes_no_folder(tmp_path: Path) -> None:
    done = run("prepare", "easy-vqa", "--folder", str(tmp_path / "data"))
    assert done.returncode == 1
    assert "no --folder" in done.stderr
    assert not (tmp_path / "data").exists()


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.mark.lengthy
def test_a_clean_file_ends_with_0_and_shows_samples(tmp_path: Path, options: list[str]) -> None:
    done = run("lint", write(tmp_path, FINE), *options, "--show", "3")
    assert done.returncode == 0, done.stderr
    assert "1 rows (llava), 1 images, at most 300 tokens a row, 5 an image" in done.stdout
    assert "<image x 5>\nWhat [bold]colour[/bold]?<|im_end|>" in done.stdout
    assert "«Red.<|im_end|>»" in done.stdout


@pytest.mark.lengthy
def test_problems_end_with_1_and_name_kind_count_and_row(tmp_path: Path, options: list[str]) -> None:
    wrong = FINE | {"id": "r-2\udcff", "image": "none.png"}
    done = run("lint", write(tmp_path, FINE, wrong), *options)
    assert done.returncode == 1, done.stderr
    assert "missing image" in done.stdout
    assert "none.png: no such file" in done.stdout
    assert "row 2 (r-2\\udcff)" in done.stdout


@pytest.mark.parametrize("content", [None, "", "[1, 2", '{"question": "what?"}'])
def test_a_file_that_cannot_be_checked_ends_with_2_and_one_line(
    tmp_path: Path, options: list[str], content: str | None
) -> None:
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_text(content)
    done = run("lint", str(path), *options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"mmllm: {path}")
    assert len(done.stderr.strip().splitlines()) == 1


def test_preparing_without_a_network_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    done = run("prepare", "llava-instruct-150k", "--folder", str(tmp_path / "set"))
    assert done.returncode == 1
    assert str(tmp_path / "set" / "llava_instruct_150k.json") in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_preparing_says_how_to_check_and_use_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    Path(write(tmp_path, FINE)).rename(tmp_path / "llava_instruct_150k.json")
    done = run("prepare", "llava-instruct-150k", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "1 of 1 images are there" in done.stdout
    assert f"mmllm data lint {tmp_path / 'llava_instruct_150k.json'} --images {tmp_path / 'images'}" in done.stdout
