"""Numerics do not change unnoticed: the first losses of every embedded recipe are those that were recorded."""

import json
from pathlib import Path

import pytest

from mmllm_core.models.home import home
from tests.train_jobs.golden_losses import FILE, N_LOSSES, equal, first_losses, recipes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
_USUAL_HOME = home()
N_TESTED = 2
"""Of the losses; `python -m tests.train_jobs.golden_losses --check` compares all, which takes a quarter of an hour."""


LIKE_ANOTHER = {"embedded-demo"}
"""What `embedded-instruct` does too, in its first steps."""


def test_every_embedded_recipe_has_golden_losses() -> None:
    assert set(GOLDEN) == set(recipes())
    assert all(len(losses) == N_LOSSES for losses in GOLDEN.values())


def losses_in(folder: Path, names: list[str]) -> dict[str, list[float]]:
    """In a home of its own, but for packages."""
    (folder / "packages").symlink_to(_USUAL_HOME / "packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMLLM_HOME", str(folder))
        return first_losses(names, N_TESTED)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return losses_in(tmp_path_factory.mktemp("home"), sorted(GOLDEN.keys() - LIKE_ANOTHER))


@pytest.mark.parametrize("name", sorted(GOLDEN.keys() - LIKE_ANOTHER))
def test_the_first_losses_are_those_that_were_recorded(name: str, found: dict[str, list[float]]) -> None:
    assert equal(found[name], GOLDEN[name][:N_TESTED]), found[name]


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(LIKE_ANOTHER))
def test_so_are_those_of_recipes_like_another(name: str, tmp_path: Path) -> None:
    [losses] = losses_in(tmp_path, [name]).values()
    assert equal(losses, GOLDEN[name][:N_TESTED]), losses
