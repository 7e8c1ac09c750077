"""What a run was started with is kept twice: in its folder, and beside its checkpoints."""

from pathlib import Path

import pytest

from mmllm_core.errors import EnvironmentLack
from mmllm_core.models.profile import load_profile
from train_jobs.launch import open_storage
from train_jobs.recipe import load_training_recipe
from train_jobs.run_folders import INPUTS, resumable_folder, runs_folder
from train_jobs.run_inputs import RunInputs, learns_the_same, read_inputs, write_inputs


@pytest.fixture
def inputs() -> RunInputs:
    return RunInputs(
        recipe=load_training_recipe("embedded-instruct"), profile=load_profile("embedded"), fingerprint="0"
    )


@pytest.mark.parametrize("text", [None, '{"recipe": '])
def test_a_run_whose_folder_was_lost_or_damaged_is_known_by_the_copy(
    text: str | None, inputs: RunInputs, tmp_path: Path
) -> None:
    folder, storage = tmp_path / "runs" / "lost", str(tmp_path / "storage")
    write_inputs(folder, inputs, storage)
    assert read_inputs(folder) == inputs
    (folder / INPUTS).unlink() if text is None else (folder / INPUTS).write_text(text)
    assert read_inputs(folder) is None
    assert read_inputs(folder, storage) == inputs


def test_a_run_goes_on_by_its_name_whatever_lies_where_one_stands(
    inputs: RunInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    write_inputs(runs_folder() / "mine", inputs)
    assert resumable_folder("mine") == runs_folder() / "mine"


def test_what_no_run_left_is_nothing(tmp_path: Path) -> None:
    assert read_inputs(tmp_path / "none", str(tmp_path / "storage")) is None


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(EnvironmentLack, match=r"checkpoint.storage: .*file cannot be written to"):
        open_storage(str(tmp_path / "file"))


def test_how_a_run_is_run_is_not_what_it_learns(inputs: RunInputs) -> None:
    recipe = inputs.recipe
    assert learns_the_same(recipe, recipe.model_copy(update={"workers": 7}))
    assert not learns_the_same(recipe, recipe.model_copy(update={"seed": recipe.seed + 1}))
