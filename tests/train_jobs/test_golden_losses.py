"""Numerics do not change unnoticed: the first losses of every embedded recipe are those that were recorded."""

import json
from pathlib import Path

import pytest

from mmllm_core.models.home import home
from tests.train_jobs.golden_losses import FILE, N_LOSSES, equal, first_losses, recipes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
_USUAL_HOME = home()
N_TESTED = 2
"""Of the losses; `python -m tests.train_jobs.golden_losses --check` compares all, which takes a quarter of an hour."""


LIKE_ANOTHER = {"embedded-demo"}
"""What `embedded-instruct` does too, in its first steps."""


def test_every_embedded_recipe_has_golden_losses() -> None:
    assert set(GOLDEN) == set(recipes())
    assert all(len(losses) == N_LOSSES for losses in GOLDEN.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LIKE_ANOTHER else ()) for name in sorted(GOLDEN)]
)
def test_the_first_losses_are_those_that_were_recorded(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "mmllm-home"
    folder.mkdir()
    (folder / "packages").symlink_to(_USUAL_HOME / "packages")
    found = first_losses(name, N_TESTED)
    assert equal(found, GOLDEN[name][:N_TESTED]), found
