"""A loss that is not finite: the run stops, or goes on without the micro-batch; either way the samples are named."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mmllm_core.data.batching import Encoded, micro_batches
from mmllm_core.errors import TrainingError
from tests.train_jobs.engines import conversations, in_workers, tiny_model, tiny_recipe
from train_jobs.training_step import training_step
from train_jobs.zero import initialise_deepspeed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Case:
    """What is trained on, and how a loss that is not finite is met."""

    stage: int
    sample: Literal["broken", "nothing to learn", "broken gradient"]
    on_non_finite: Literal["stop", "skip"]

    def file(self, folder: Path, rank: int) -> Path:
        return folder / f"{self.stage} {self.sample} {self.on_non_finite} {rank}.json"


CASES = [Case(stage, "broken", "skip") for stage in (2, 3)] + [
    Case(stage, "nothing to learn", "skip") for stage in (2, 3)
]
STOPPING = Case(2, "broken", "stop")
GRADIENTS = [Case(stage, "broken gradient", "skip") for stage in (0, 2, 3)]
STOPPING_GRADIENT = Case(2, "broken gradient", "stop")
ALL = [*CASES, STOPPING, *GRADIENTS, STOPPING_GRADIENT]
Results = dict[Case, list[list[Any]]]


def samples_of(step: int, case: Case) -> list[Encoded]:
    """At step 1 the first sample of the second worker has an image of NaN, or nothing that is supervised."""
    samples = conversations(step)
    if step == 1 and case.sample != "broken gradient":
        sample = next(sample for s in range(9) for sample in conversations(s) if sample.images)
        if case.sample == "broken":
            images = tuple(np.full_like(image, np.nan) for image in sample.images)
            samples[1] = replace(sample, images=images, id="no-numbers")
        else:
            unsupervised = replace(sample.rendered, labels=[-100] * sample.n_tokens)
            samples[1] = replace(sample, rendered=unsupervised)
    return samples


def work(rank: int, folder: Path) -> None:
    for case in ALL:
        case.file(folder, rank).write_text(json.dumps(train(rank, case)))


def train(rank: int, case: Case) -> list[Any]:
    """What each step gave; the error, if one ended it."""
    recipe = tiny_recipe({"stage": case.stage}, micro_batch=1)
    engine = initialise_deepspeed(tiny_model(recipe, torch.float32), recipe)
    weight = engine.module.connector.last_layer.weight
    results: list[Any] = []
    for step in range(3):
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2
        batches = micro_batches(samples_of(step, case)[rank::2], recipe.batching, recipe.micro_batch)
        broken = case.sample == "broken gradient" and step == 1
        hook = weight.register_hook(lambda gradient: gradient * math.nan) if broken else None
        try:
            done = training_step(engine, batches, step=step, on_non_finite=case.on_non_finite)
        except TrainingError as error:
            return [*results, str(error)]
        if hook:
            hook.remove()
        results.append([done.loss, done.grad_norm, list(done.skipped)])
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of each case and worker, what each step gave."""
    folder = tmp_path_factory.mktemp("results")
    in_workers(work, folder, world=2)
    return {case: [json.loads(case.file(folder, rank).read_text()) for rank in range(2)] for case in ALL}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_micro_batch_without_a_finite_loss_is_left_out(stage: int, results: Results) -> None:
    found, other = results[Case(stage, "broken", "skip")]
    assert found == other
    assert [skipped for *_, skipped in found] == [[], ["no-numbers"], []]
    without, _ = results[Case(stage, "nothing to learn", "skip")]
    # The loss is that of what was left; the gradient is not scaled up for what was left out.
    assert [loss for loss, *_ in found[:2]] == pytest.approx([loss for loss, *_ in without[:2]], rel=1e-5)
    assert found[1][1] < without[1][1]
    assert found[2][0] == pytest.approx(without[2][0], rel=0.05)


def test_a_run_stops_and_names_the_samples(results: Results) -> None:
    for of_worker in results[STOPPING]:
        assert len(of_worker) == 2
        assert "step 1: the loss is not finite in a batch of no-numbers" in of_worker[1]
        assert "on_non_finite: skip" in of_worker[1]


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: f"stage {case.stage}")
def test_a_step_without_finite_gradients_is_left_out(case: Case, results: Results) -> None:
    _, second, third = results[case][0]
    assert not math.isfinite(second[1])
    assert set(second[2]) == {f"1-{i}" for i in range(6)}
    assert third[2] == []
    assert math.isfinite(third[0])
    assert math.isfinite(third[1])


def test_gradients_that_are_not_finite_stop_a_run(results: Results) -> None:
    for of_worker in results[STOPPING_GRADIENT]:
        assert len(of_worker) == 2
        assert "step 1: gradients are not finite, of 1-" in of_worker[1]
