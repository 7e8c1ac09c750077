"""`mmllm evaluate-spoken` and `mmllm benchmark`: mistakes are one line, and what is printed is what was measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.spoken_command import print_report
from mmllm_core.data.sample import Question
from mmllm_core.evaluation.spoken import Hearing, SpokenReport
from mmllm_core.evaluation.wer import normalise_english


@pytest.fixture(scope="module", autouse=True)
def _spellings() -> None:
    """The table of spellings is read once, from the usual home and not from a test's own."""
    normalise_english("")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("evaluate-spoken", "--bundle", "/nowhere"), "/nowhere"),
        (("evaluate-spoken", "--save", "/proc/none/report.json"), "--save"),
        (("benchmark", "pope", "--lmms-eval", "/nowhere/lmms-eval"), "pip install 'lmms-eval=="),
        (("benchmark", "pope", "--lmms-eval", "/bin/true", "--url", "http://127.0.0.1:9"), "make serve"),
        (("benchmark", "pope", "--out", "/proc"), "--out"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments: tuple[str, ...], named: str, tmp_path: Path) -> None:
    environment = os.environ | {"MMLLM_HOME": str(tmp_path), "COLUMNS": "200"}
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_report_says_what_hearing_costs(capsys: pytest.CaptureFixture[str]) -> None:
    def hearing(number: int, heard: str, typed: str, spoken: str) -> Hearing:
        asked = Question(f"q{number}", Path("0.png"), "is it teal?", "yes", "yes/no")
        return Hearing(asked, heard, typed, typed, spoken)

    print_report(
        SpokenReport(
            (
                hearing(0, "Is it teal?", "yes", "yes"),
                hearing(1, "Is it teal?", "no", "no"),
                hearing(2, "Is it [deal]?", "yes", "no"),
                hearing(3, "Is it deal?", "no", "no"),
            )
        )
    )
    said = capsys.readouterr().out
    assert "word error rate 16.7%: 1 words taken for others, 1 not heard, 0 heard that nobody said, of 12" in said
    assert "2 of 4 questions heard rightly; of these 50.0% answered rightly" in said
    assert "a word heard wrongly: 2, of which 1 answered rightly when typed" in said
    assert "every word heard: 1, of which 0 answered rightly when typed" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["all", "4", "50.0%"] in [row[:3] for row in rows]
    assert ["teal", "deal", "1"] in rows
    assert ["teal", "(nothing)", "1"] in rows, "what stands in brackets is no speech to Whisper's normaliser"
