"""Nothing is lost: workers and drivers are killed for real, and runs end as if nothing had been."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import yaml
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
from safetensors.torch import load_file

from cluster.local import local_ray
from mmllm_core.config import Recipe
from mmllm_core.errors import ConfigError, EnvironmentLack, TrainingError
from mmllm_core.models.home import home
from tests.train_jobs.conftest import TinyRecipe
from tests.train_jobs.kept_checkpoints import kept_step, wait_for_kept_step
from tests.waiting import wait_for
from train_jobs.origins import starting_profile
from train_jobs.progress import read_metrics, step_lines
from train_jobs.run_folders import LOG, runs_folder
from train_jobs.run_inputs import RunInputs, write_inputs
from train_jobs.train import TrainedRun, resume, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = {"steps": 60, "workers": 2, "checkpoint": {"every_steps": 10}}


@pytest.fixture
def own_ray(tiny_home: Path) -> Iterator[None]:
    with local_ray():
        yield


def losses(run: TrainedRun) -> list[float]:
    lines = step_lines(read_metrics(run.folder / LOG))
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def weights(run: TrainedRun) -> dict[str, torch.Tensor]:
    adapter = load_file(run.bundle.folder / "adapter" / "adapter_model.safetensors")
    return adapter | load_file(run.bundle.folder / "connector.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def events(run: TrainedRun, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.folder / LOG) if line.get("event") == kind]


@pytest.mark.usefixtures("own_ray")
def test_a_run_whose_worker_is_killed_ends_as_one_that_was_left_alone(tiny_recipe: TinyRecipe) -> None:
    alone = train(tiny_recipe("alone", **LONG))

    def kill_a_worker() -> None:
        wait_for_kept_step(home() / "ray" / "killed", 10)
        ours = psutil.Process().children(recursive=True)
        workers = [process for process in ours if "RayTrainWorker" in " ".join(process.cmdline())]
        workers[-1].send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    killed = train(tiny_recipe("killed", **LONG))
    thread.join()
    assert [event["step"] >= 10 for event in events(killed, "resumed")] == [True]
    assert losses(killed) == losses(alone)
    assert same(weights(killed), weights(alone))


@pytest.mark.long
def test_a_notice_of_preemption_makes_a_checkpoint_at_once(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.2")
    recipe = tiny_recipe("preempted", steps=200, checkpoint={"every_steps": 200})
    log = runs_folder() / "preempted" / LOG

    def announce() -> None:
        wait_for(lambda: len(step_lines(read_metrics(log))) >= 5, "the fifth step", seconds=400)
        context = ray.get_runtime_context()
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        ends = int((time.time() + 3600) * 1000)
        GcsClient(address=context.gcs_address).drain_node(context.get_node_id(), reason, "to be reclaimed", ends)

    with local_ray():
        thread = threading.Thread(target=announce)
        thread.start()
        run = train(recipe)
        thread.join()
    (notice,) = events(run, "preemption")
    assert 5 <= notice["step"] < 200
    assert [event["step"] for event in events(run, "checkpoint")] == [notice["step"], 200]


@pytest.mark.long
def test_a_run_takes_the_workers_that_there_are(tiny_recipe: TinyRecipe) -> None:
    """With the same conversations, and so nearly the same losses."""
    settings = {"learning_rates": {"connector": 1e-4, "lm": 1e-4}, "workers": 2}
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(EnvironmentLack, match="2 workers of 1 CPUs do not fit the 1 CPUs"):
            train(tiny_recipe("too-many", **settings))
        alone = train(tiny_recipe("elastic", min_workers=1, **settings))
    finally:
        ray.shutdown()
    with local_ray():
        both = train(tiny_recipe("both", **settings))
    for run, workers in ((alone, 1), (both, 2)):
        assert [line["workers"] for line in read_metrics(run.folder / LOG) if "workers" in line] == [workers]
    assert losses(alone) == pytest.approx(losses(both), rel=5e-3)


def interrupt(recipe: Recipe, step: int, arguments: list[str]) -> None:
    """Train in a process of its own, and kill that when it would go on from `step` or a later one."""
    path = home() / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    kept = home() / "ray" / recipe.name
    before = kept_step(kept)  # workers of a driver that was killed may have come further than it
    command = [sys.executable, "-m", "cluster.cli", "train", *(arguments or [str(path)])]
    with (home() / "driver.log").open("wb") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=os.environ)
    try:
        wait_for_kept_step(kept, max(step, before + 1))
    finally:
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()  # the driver alone: what it started goes on for a while
        driver.wait()
        for process in psutil.wait_procs(family, timeout=2)[1]:  # but shall not come to the end of the run
            process.kill()


@pytest.mark.long
def test_a_run_goes_on_with_other_numbers_of_workers_after_its_driver_was_killed(tiny_recipe: TinyRecipe) -> None:
    settings = LONG | {"learning_rates": {"connector": 1e-4, "lm": 1e-4}}
    recipe = tiny_recipe("moved", **settings)
    interrupt(recipe, 10, [])
    interrupt(recipe, 30, ["--resume", "moved", "--workers", "1"])
    with local_ray():
        moved = resume("moved", {"workers": 2})
        whole = train(tiny_recipe("whole", **settings))
        assert len(events(moved, "resumed")) == 2
        assert [line["workers"] for line in read_metrics(moved.folder / LOG) if "workers" in line] == [2, 1, 2]
        assert losses(moved) == pytest.approx(losses(whole), rel=5e-3)
        ids = [line["samples"] for line in step_lines(read_metrics(moved.folder / LOG))]
        assert ids == [4] * 60


def test_what_is_learned_may_not_change_when_a_run_goes_on(tiny_recipe: TinyRecipe) -> None:
    with pytest.raises(TrainingError, match="no such run"):
        resume("nowhere")
    recipe = tiny_recipe("inputs")
    inputs = RunInputs(recipe=recipe, profile=starting_profile(recipe), fingerprint="0")
    write_inputs(runs_folder() / "inputs", inputs)
    with pytest.raises(ConfigError, match=r"steps.*would change what is learned"):
        resume("inputs", {"steps": 12})
    with pytest.raises(TrainingError, match=r"CLIP .* changed since the run began"):
        resume("inputs")
    other = inputs.model_copy(update={"start": "1"})
    with pytest.raises(TrainingError, match=r"bundle .* changed since the run began"):
        inputs.require_unchanged(other)


def test_checkpoints_of_an_interrupted_run_are_not_removed_unasked(tiny_recipe: TinyRecipe, tiny_home: Path) -> None:
    checkpoint = tiny_home / "ray" / "precious" / "checkpoint_1"
    checkpoint.mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"precious: a run of this name was interrupted.*--discard"):
        train(tiny_recipe("precious"))
    assert checkpoint.is_dir()
