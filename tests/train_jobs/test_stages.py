"""Every stage from recipe to bundle, over Ray, with tiny models: what is trained moves, and nothing else does."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from pyarrow.fs import FileSelector
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.local import local_ray
from mmllm_core.bundle import Bundle
from mmllm_core.config import Recipe
from mmllm_core.errors import ConfigError, EnvironmentLack, TrainingError
from mmllm_core.models.home import home
from tests.train_jobs.conftest import TinyRecipe
from tests.train_jobs.kept_checkpoints import wait_for_kept_step
from train_jobs.checkpoint import load_checkpoint
from train_jobs.embed_images import embed_recipe
from train_jobs.evaluate import Asked, evaluate
from train_jobs.launch import open_storage
from train_jobs.origins import find_origins, starting_profile
from train_jobs.progress import read_metrics, step_lines
from train_jobs.run_folders import LOG, runs_folder
from train_jobs.run_record import read_run
from train_jobs.train import TrainedRun, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def own_ray(tiny_home: Path) -> Iterator[None]:
    with local_ray():
        yield


@pytest.fixture(scope="module")
def chat(tiny_home: Path) -> dict[str, str]:
    """A source of text conversations."""
    path = tiny_home / "chat.jsonl"
    lines = [
        f'{{"messages": [{{"role": "user", "content": "Count to {i}."}}, {{"role": "assistant", "content": "{i}"}}]}}'
        for i in range(20)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return {"dataset": "chat", "file": str(path)}


def losses(run: TrainedRun) -> list[float]:
    return [line["loss"] for line in step_lines(read_metrics(run.folder / LOG))]


def connector_of(bundle: Bundle) -> dict[str, torch.Tensor]:
    return load_file(bundle.folder / "connector.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_stored_features_give_the_losses_of_real_time_ones(tiny_recipe: TinyRecipe) -> None:
    stored = tiny_recipe("stored", features="stored", tracker="tensorboard", evaluation_questions=6)
    embed_recipe(stored)
    run = train(stored)
    assert losses(run) == pytest.approx(losses(train(tiny_recipe("real-time"))), rel=1e-3)
    assert [answer.kind for answer in read_run(run.folder).answers]
    assert list((run.folder / "tensorboard").iterdir())
    line = step_lines(read_metrics(run.folder / LOG))[-1]
    assert line["samples"] == 4
    assert line["tokens"] > line["supervised"] > 0
    assert 0 < line["mfu"] < 1
    assert line["memory_gb"] > 0.1
    assert {"lr_connector", "lr_lm"} < line.keys()


@pytest.mark.long
def test_an_aligned_connector_is_tuned_further(tiny_recipe: TinyRecipe) -> None:
    aligned = train(
        tiny_recipe("aligned", stage="align", lora=None, learning_rates={"connector": 1e-2}, zero={"stage": 0})
    )
    assert not (aligned.bundle.folder / "adapter").exists()
    tuned = train(tiny_recipe("tuned", from_bundle="aligned"))
    assert (tuned.bundle.folder / "adapter").is_dir()
    assert losses(tuned)[0] < losses(aligned)[0], "it starts where the alignment ended"
    assert not equal(connector_of(tuned.bundle), connector_of(aligned.bundle))
    again = train(tiny_recipe("tuned-further", from_bundle="tuned", steps=2))
    assert losses(again)[0] < losses(tuned)[0]
    with pytest.raises(ConfigError, match="has rank 4, and the recipe's lora 8"):
        train(tiny_recipe("other-rank", from_bundle="tuned", lora={"rank": 8}))


def test_a_text_stage_leaves_the_connector_as_it_was(tiny_recipe: TinyRecipe, chat: dict[str, str]) -> None:
    settings = {"stage": "text", "data": {"sources": [chat]}, "learning_rates": {"lm": 1e-2}, "features": "stored"}
    adapter = train(tiny_recipe("text", **settings))
    assert losses(adapter)[-1] < losses(adapter)[0]
    assert adapter.bundle.load_model().adapter is not None


@pytest.mark.long
def test_all_of_an_lm_and_of_clips_tower_are_trained_and_bundled(tiny_recipe: TinyRecipe, tiny_home: Path) -> None:
    values = yaml.safe_load((tiny_home / "tiny.yaml").read_text(encoding="utf-8"))
    values["language"] |= {"quantization": "none"}
    (tiny_home / "whole.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    settings = {
        "profile": str(tiny_home / "whole.yaml"),
        "stage": "end_to_end",
        "lora": None,
        "learning_rates": {"connector": 1e-3, "lm": 1e-3, "vision": 1e-3},
        "gradient_checkpointing": True,
        "zero": {"stage": 3},
        "workers": 2,
        "evaluation_questions": 4,
    }
    run = train(tiny_recipe("all", **settings))
    assert losses(run)[-1] < losses(run)[0]
    asked_again = evaluate(run.bundle, Asked(limit=4), workers=1)  # by its own CLIP, of whose features none are stored
    assert asked_again.answers == [answer.after for answer in read_run(run.folder).answers]
    model, vision = run.bundle.load_model(), run.bundle.load_vision()
    start = Recipe.model_validate(run.bundle.info.recipe)
    origins = find_origins(start, starting_profile(start))
    assert vision.fingerprint != origins.fingerprint
    untrained = AutoModelForCausalLM.from_pretrained(origins.language).state_dict()
    trained = model.causal_lm.state_dict()
    moved = [name for name in untrained if not torch.equal(untrained[name].float(), trained[name].float())]
    assert len(moved) > len(untrained) // 2


@pytest.mark.long
def test_a_missing_image_is_named_with_its_sample_and_checkpoints_stay(
    tiny_recipe: TinyRecipe, tiny_home: Path
) -> None:
    rows = []
    for i in range(8):
        Image.new("RGB", (32, 32), (i * 20, 0, 0)).save(tiny_home / f"image-{i}.png")
        said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
        rows.append({"id": f"row-{i}", "image": f"image-{i}.png", "conversations": said})
    file = tiny_home / "images.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    recipe = tiny_recipe(
        "missing",
        data={"sources": [{"dataset": "llava", "file": str(file), "images": str(tiny_home)}]},
        steps=60,
        checkpoint={"every_steps": 10},
    )
    log = runs_folder() / "missing" / LOG

    def lose_an_image() -> None:
        wait_for_kept_step(home() / "ray" / "missing", 10)
        (tiny_home / "image-3.png").unlink()

    thread = threading.Thread(target=lose_an_image)
    thread.start()
    with pytest.raises(TrainingError, match=r"sample '.*row-3.*image-3\.png"):
        train(recipe)
    thread.join()
    assert sum("phase" in line and line["phase"] == "training" for line in read_metrics(log)) == 1, "not tried again"
    Image.new("RGB", (32, 32), (60, 0, 0)).save(tiny_home / "image-3.png")
    run = train(recipe)  # which goes on
    assert [line["event"] for line in read_metrics(log) if line.get("event") == "resumed"] == ["resumed"]
    assert len(losses(run)) == 60


def test_a_place_for_checkpoints_that_cannot_be_written_ends_a_run_before_it_starts(
    tiny_recipe: TinyRecipe, tiny_home: Path
) -> None:
    (tiny_home / "a-file").write_text("")
    place = tiny_home / "a-file" / "checkpoints"
    with pytest.raises(EnvironmentLack, match=r"checkpoint\.storage: .*a-file.*cannot be written"):
        train(tiny_recipe("unwritable", checkpoint={"storage": str(place)}))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 300 kB: a checkpoint of 200 kB fits, and a second does not."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a filesystem here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.long
def test_storage_that_is_full_is_a_named_error_and_keeps_the_last_checkpoint(
    tiny_recipe: TinyRecipe, small_disk: Path
) -> None:
    recipe = tiny_recipe("full", checkpoint={"every_steps": 2, "storage": str(small_disk)}, max_restarts=1)
    with pytest.raises(TrainingError, match=r"full: .*No space left on device.*--resume full"):
        train(recipe)
    (kept,) = (folder for folder in (small_disk / "full").glob("checkpoint_*") if folder.is_dir())
    assert load_checkpoint(kept)[1].step == 2
    subprocess.run(["mount", "-o", "remount,size=5m", str(small_disk)], check=True)
    assert len(losses(train(recipe))) == 6


@pytest.mark.long
@pytest.mark.parametrize("storage", ["local", "s3"])
def test_checkpoints_go_to_any_filesystem(
    storage: str, tiny_recipe: TinyRecipe, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"local://{tmp_path}"
    if storage == "s3":  # Ray was started without the credentials that the fixture puts into the environment
        url = request.getfixturevalue("s3_url").replace("s3://", "s3://test:test@")
    recipe = tiny_recipe(f"on-{storage}", checkpoint={"every_steps": 2, "storage": url, "keep": 2})
    run = train(recipe)
    filesystem, folder = open_storage(url)
    found = filesystem.get_file_info(FileSelector(f"{folder}/on-{storage}", recursive=True))
    assert sum(info.base_name == "weights.safetensors" for info in found) == 2
    assert len(losses(run)) == 6
    made = connector_of(run.bundle)
    shutil.rmtree(run.folder)  # what lies beside the checkpoints tells what the run was
    again = train(recipe)
    assert losses(again) == [], "it was through"
    assert equal(connector_of(again.bundle), made)
