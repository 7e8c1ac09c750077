"""Checkpoints under every ZeRO stage: exact resume, other numbers of workers, and steps cut into micro-batches.

Workers are processes of their own with gloo between them; no Ray.
"""

import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmllm_core.data.batching import micro_batches
from mmllm_core.errors import TrainingError
from tests.train_jobs.engines import BATCH_SIZE, conversations, in_workers, tiny_model, tiny_recipe
from train_jobs.checkpoint import RunState, check_manifest, load_checkpoint, load_weights, save_checkpoint
from train_jobs.optimizer_state import TrainedState, scatter
from train_jobs.training_step import seed_step, training_step
from train_jobs.zero import initialise_deepspeed


@dataclass(frozen=True)
class Part:
    """A part of a run, from one step to another, and where its checkpoints go: one a step."""

    zero: dict[str, Any]
    dtype: str
    start: int
    end: int
    target: Path
    source: Path | None = None
    micro_batch: int = BATCH_SIZE
    world: int = 1

    def checkpoint(self, step: int) -> Path:
        return self.target / f"{step}"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds."""
    files = ("weights", "exp_avg", "exp_avg_sq")
    return {f"{file} {k}": v for file in files for k, v in load_file(folder / f"{file}.safetensors").items()}


CASES: list[tuple[dict[str, Any], str]] = [
    ({"stage": 0}, "float32"),
    ({"stage": 1}, "bfloat16"),
    ({"stage": 2}, "float32"),
    ({"stage": 2}, "bfloat16"),
    ({"stage": 2, "offload_optimizer": True}, "bfloat16"),
    ({"stage": 3}, "float32"),
    ({"stage": 3}, "bfloat16"),
]
MOVED = [case for case in CASES if case[0]["stage"] >= 2 and case[1] == "float32"]
"""Where the number of workers changes too."""


def named(case: tuple[dict[str, Any], str]) -> str:
    zero, dtype = case
    return "-".join(map(str, [*zero.values(), dtype]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of runs that go through, that are cut into micro-batches, and that are resumed in new processes."""
    place = tmp_path_factory.mktemp("runs")
    whole = {named(case): Part(*case, 0, 4, place / f"whole-{named(case)}") for case in CASES}
    cut = [Part(*case, 0, 4, place / f"cut-{named(case)}", micro_batch=2) for case in MOVED]
    in_workers(run_parts, [*whole.values(), *cut], world=1)
    resumed = [Part(*case, 2, 4, place / f"resumed-{named(case)}", whole[named(case)].checkpoint(2)) for case in CASES]
    in_workers(run_parts, resumed, world=1)
    wider = [
        Part(*case, 2, 3, place / f"wider-{named(case)}", whole[named(case)].checkpoint(2), world=2) for case in MOVED
    ]
    in_workers(run_parts, wider, world=2)
    last = [
        Part(*case, 3, 4, place / f"last-{named(case)}", part.checkpoint(3))
        for case, part in zip(MOVED, wider, strict=True)
    ]
    in_workers(run_parts, last, world=1)
    return place


def losses_of(folder: Path) -> list[float]:
    found: list[float] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_resumed_run_equals_one_that_was_not_interrupted(case: tuple[dict[str, Any], str], folder: Path) -> None:
    whole, resumed = (folder / f"{kind}-{named(case)}" for kind in ("whole", "resumed"))
    assert losses_of(whole)[2:] == losses_of(resumed)
    expected, found = tensors(whole / "4"), tensors(resumed / "4")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("case", MOVED, ids=named)
def test_one_worker_two_and_one_again_take_the_same_steps(case: tuple[dict[str, Any], str], folder: Path) -> None:
    whole, wider, last = (folder / f"{kind}-{named(case)}" for kind in ("whole", "wider", "last"))
    assert losses_of(wider) + losses_of(last) == pytest.approx(losses_of(whole)[2:], abs=1e-5)
    expected, moved = tensors(whole / "4"), tensors(last / "4")
    assert all(torch.allclose(expected[name], moved[name], atol=1e-5) for name in expected)


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("case", MOVED, ids=named)
def test_accumulation_over_micro_batches_gives_the_same_losses(case: tuple[dict[str, Any], str], folder: Path) -> None:
    whole, cut = (folder / f"{kind}-{named(case)}" for kind in ("whole", "cut"))
    assert losses_of(cut) == pytest.approx(losses_of(whole), abs=1e-5)


def run_parts(rank: int, parts: list[Part]) -> None:
    """Take the steps of every part, in the processes of `in_workers`."""
    for part in parts:
        _run(rank, part)


def _run(rank: int, part: Part) -> None:
    # Dropout shows whether random numbers go on too; cut into micro-batches, a step draws others.
    recipe = tiny_recipe(part.zero, part.micro_batch, dropout=0.1 if part.dtype == "bfloat16" else 0.0)
    model = tiny_model(recipe, getattr(torch, part.dtype))
    manifest, trained = model.trainable_names(), None
    if part.source:
        trained, state = load_checkpoint(part.source)
        assert state.step == part.start
        load_weights(model, trained.weights)
    engine = initialise_deepspeed(model, recipe)
    if trained:
        scatter(engine, trained)
    losses = []
    for step in range(part.start, part.end):
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + step)
        seed_step(0, step, rank)
        batches = micro_batches(conversations(step)[rank :: part.world], recipe.batching, recipe.micro_batch)
        losses.append(training_step(engine, batches, step=step).loss)
        if rank == 0:
            part.checkpoint(step + 1).mkdir(parents=True)
        folder = part.checkpoint(step + 1) if rank == 0 else None
        save_checkpoint(engine, manifest, folder, RunState(step + 1, 0.0))
    if rank == 0:
        (part.target / "losses.json").write_text(json.dumps(losses))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_disk_that_takes_no_more_is_a_named_error_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    in_workers(_fill_the_disk, tmp_path, world=1)
    said = (tmp_path / "said").read_text()
    assert f"step 2: the checkpoint cannot be written to {tmp_path / 'second'}" in said
    assert "File too large" in said
    assert "the last one stays" in said
    assert load_checkpoint(tmp_path / "first")[1].step == 1


def _fill_the_disk(rank: int, folder: Path) -> None:
    recipe = tiny_recipe({"stage": 2})
    model = tiny_model(recipe, torch.float32)
    manifest = model.trainable_names()
    engine = initialise_deepspeed(model, recipe)
    for name in ("first", "second"):
        (folder / name).mkdir()
    training_step(engine, micro_batches(conversations(0), recipe.batching, recipe.micro_batch), step=0)
    save_checkpoint(engine, manifest, folder / "first", RunState(1, 0.0))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
    with pytest.raises(TrainingError) as caught:
        save_checkpoint(engine, manifest, folder / "second", RunState(2, 0.0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    (folder / "said").write_text(str(caught.value))


def state_of(*names: str) -> TrainedState:
    weights = {name: torch.ones(2) for name in names}
    return TrainedState(weights, {"exp_avg": dict(weights), "exp_avg_sq": dict(weights)}, 1)


def test_what_is_saved_must_be_what_is_trained() -> None:
    check_manifest(state_of("a", "b"), {"a", "b"})
    with pytest.raises(TrainingError, match="weights of 'b' are lacking"):
        check_manifest(state_of("a"), {"a", "b"})
    with pytest.raises(TrainingError, match="weights of 'c' are surplus"):
        check_manifest(state_of("a", "c"), {"a"})
    empty = state_of("a")
    empty.weights["a"] = torch.ones(0)
    with pytest.raises(TrainingError, match="weights of 'a' are empty"):
        check_manifest(empty, {"a"})


def test_a_checkpoint_that_is_not_whole_is_one_named_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "loss_ema": 0.0, "adam_steps": 1}))
    (tmp_path / "weights.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 broken")
    with pytest.raises(TrainingError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path)
