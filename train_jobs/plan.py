"""What a recipe costs before it runs: memory of each worker, steps, tokens, hours, and which settings fit.

In: a recipe, a profile and an accelerator. Out: a `Plan`. No weights are loaded and no Ray is started; the arithmetic
is `train_jobs.memory_model`'s. Word alignment and evaluation, which take seconds to minutes, are not counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmllm_core.config import Profile, Recipe, check_recipe, parse_config
from mmllm_core.errors import BundleError, ConfigError
from mmllm_core.language import compute_dtype
from mmllm_core.loss import FLOATS_AT_ONCE, LOGITS_AT_ONCE
from train_jobs.accelerators import CPU, Accelerator, accelerator, usable_cores
from train_jobs.batch_estimate import BatchEstimate, batch_estimator
from train_jobs.memory_model import (
    ZERO_STAGES,
    BatchShape,
    Memory,
    Setting,
    ZeroStage,
    checkpoint_bytes,
    memory,
)
from train_jobs.model_shape import ModelShape, model_shape, read_lm_config
from train_jobs.origins import starting_profile
from train_jobs.recipe import recipe_profile
from train_jobs.rehearsal import LAYERS, LONGEST, Rehearsal, this_machine

HEAD_ROOM = 0.1
"""Share of an accelerator's memory that a recommended setting leaves free."""
MFU = 0.3
"""Share of the accelerator's peak that training reaches unless it is told: PaLM reports 0.46 (arXiv:2204.02311, table
3); short rows and NF4, which is dequantized at every use, keep below that."""
_REHEARSED_STEPS = 5
_REHEARSED_POSITIONS = 1024
_REHEARSED_WEIGHTS = 1e8


@dataclass(frozen=True)
class PlanOptions:
    """What is asked of a plan, besides the recipe."""

    gpu: str
    workers: int
    mfu: float = MFU
    lm_shape: Path | None = None
    """The LM's `config.json`, where the profile's own cannot be had."""


@dataclass(frozen=True)
class Choice:
    """A setting, and what it takes."""

    zero_stage: ZeroStage
    micro_batch: int
    memory: Memory
    refused: str | None
    """Why it cannot be; None if it can."""


@dataclass(frozen=True)
class Plan:
    """What a recipe costs."""

    recipe: Recipe
    options: PlanOptions
    accelerator: Accelerator
    model: ModelShape
    batches: BatchEstimate
    as_written: Choice
    stages: tuple[Choice, ...]
    """Every ZeRO stage at the recipe's micro-batch."""
    recommended: Choice | None
    """The lowest stage that fits, with the largest micro-batch (a power of two) that fits there."""

    @property
    def tokens_per_step(self) -> float:
        """Over all workers, what the conversations of a batch begin with counted once."""
        return self.options.workers * self.batches.rows_per_step * self.batches.mean

    @property
    def accumulation(self) -> int:
        """Micro-batches that a worker takes in a step."""
        return math.ceil(self.batches.rows_per_step / self.recipe.micro_batch)

    @property
    def tokens(self) -> float:
        """Of the whole run."""
        return self.recipe.steps * self.tokens_per_step

    @cached_property
    def flops(self) -> float:
        """Of the whole run, all workers; what checkpointing computes again is not counted."""
        rows = self.recipe.steps * self.options.workers * self.batches.rows_per_step
        images = rows * self.batches.mean_images
        return self.model.work.step_flops(
            tokens=self.tokens,
            mean_length=self.batches.mean_conversation,
            n_supervised=rows * self.batches.mean_supervised,
            n_features=images * self.model.n_features,
            n_patches=images * self.model.tower.n_patches if self.model.tower else 0,
        )

    @property
    def hours(self) -> float:
        """Of training steps, at the assumed share of the peak.

        Gradient checkpointing adds a forward pass, a half of what frozen weights cost and a third of what trained ones
        do (Korthikanti et al., arXiv:2205.05198, section 5).
        """
        work = self.model.work
        again = 2 * (work.n_frozen + work.n_trained) * self.tokens if self.recipe.gradient_checkpointing else 0.0
        speed = self.options.workers * self.accelerator.flops * self.options.mfu
        return (self.flops + again) / speed / 3600

    @property
    def checkpoint_bytes(self) -> float:
        """Of a checkpoint on disk."""
        return checkpoint_bytes(self.model)


def plan(recipe: Recipe, options: PlanOptions) -> Plan:
    """Plan a run of `recipe` on `options.workers` workers, whatever the recipe's own number is.

    Raises:
        ConfigError: an unknown accelerator, or a profile or config that cannot be used.
        WeightsError: the LM's config cannot be had.
        ConversationError: the recipe's data cannot be rendered.
    """
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu {options.mfu:g}: give a share of the peak, above 0 and at most 1")
    if options.workers > recipe.batch_size:
        raise ConfigError(f"--gpus {options.workers}: a batch_size of {recipe.batch_size} leaves some idle: raise it")
    profile = planned_profile(recipe)
    check_recipe(recipe, profile)
    on_cpu = options.gpu.lower() == CPU
    if on_cpu:
        dtype = compute_dtype(profile.language.dtype, CPU)
        profile = profile.model_copy(update={"language": profile.language.model_copy(update={"dtype": dtype})})
    chip = None if on_cpu else accelerator(options.gpu)
    lm_config = read_lm_config(profile, options.lm_shape)
    model = model_shape(profile, recipe, lm_config)
    folder = options.lm_shape.parent if options.lm_shape else None
    estimate = batch_estimator(recipe, profile, model.image_positions, options.workers, folder)
    batches = estimate(recipe.micro_batch)
    chip = chip or this_machine(_rehearsal(recipe, profile, lm_config, model, batches), options.workers)
    planner = _Planner(recipe, profile, model, estimate, chip, options.workers)
    stages = tuple(planner.choice(stage, recipe.micro_batch) for stage in ZERO_STAGES)
    return Plan(
        recipe=recipe,
        options=options,
        accelerator=chip,
        model=model,
        batches=batches,
        as_written=stages[recipe.zero.stage],
        stages=stages,
        recommended=planner.recommend(),
    )


def planned_profile(recipe: Recipe) -> Profile:
    """The recipe's profile, with the connector of the bundle that the run goes on from, if that is here.

    The bundle's own profile would name weights within the bundle.

    Raises:
        ConfigError: as `starting_profile`.
    """
    profile = recipe_profile(recipe)
    try:
        return profile.model_copy(update={"connector": starting_profile(recipe).connector})
    except BundleError:
        return profile


def _rehearsal(
    recipe: Recipe, profile: Profile, lm_config: Any, model: ModelShape, batches: BatchEstimate
) -> Rehearsal:
    """The recipe's first batches through a few layers, all of it cut to what a core does in seconds."""
    n_layers = max(1, min(LAYERS, int(_REHEARSED_WEIGHTS * model.n_layers / model.n_linear), model.n_layers))
    few_words = {"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    lengths = tuple(min(length, LONGEST) for length in batches.lengths[:_REHEARSED_STEPS])
    lora = recipe.lora
    if lora and lora.layers:
        lora = lora.model_copy(update={"layers": math.ceil(lora.layers * n_layers / model.n_layers)})
    return Rehearsal(
        lm_config=lm_config.to_dict() | few_words | {"num_hidden_layers": n_layers},
        language=profile.language.model_dump(mode="json"),
        lora=lora.model_dump(mode="json") if lora else None,
        trains_lm=model.trains_whole_lm,
        gradient_checkpointing=recipe.gradient_checkpointing,
        rows=max(1, min(recipe.micro_batch, _REHEARSED_POSITIONS // max(lengths))),
        lengths=lengths,
    )


@dataclass(frozen=True)
class _Planner:
    recipe: Recipe
    profile: Profile
    model: ModelShape
    estimate: Callable[[int], BatchEstimate]
    """By micro-batch."""
    accelerator: Accelerator
    workers: int

    def choice(self, stage: ZeroStage, micro_batch: int) -> Choice:
        """A setting, and what it takes; offloading as the recipe says, where the stage can."""
        chip, zero = self.accelerator, self.recipe.zero
        batches = self.estimate(micro_batch)
        rows = min(micro_batch, math.ceil(batches.rows_per_step))
        device = "cuda" if chip.is_gpu else "cpu"
        batch = BatchShape(
            rows=rows,
            length=batches.longest,
            n_supervised=batches.n_supervised,
            n_images=batches.n_images,
            queries=batches.queries,
            keys=batches.keys,
        )
        setting = Setting(
            zero_stage=stage,
            workers=self.workers,
            gpu=chip.is_gpu,
            runtime=chip.runtime,
            slack=chip.slack,
            offload_optimizer=zero.offload_optimizer and stage > 0,
            offload_parameters=zero.offload_parameters and stage == 3,
            gradient_checkpointing=self.recipe.gradient_checkpointing,
            logits_at_once=LOGITS_AT_ONCE[device],
            floats_at_once=FLOATS_AT_ONCE[device],
        )
        needs = memory(self.model, batch, setting)
        return Choice(stage, micro_batch, needs, self._refusal(stage, needs.total))

    def recommend(self) -> Choice | None:
        """The lowest stage that fits, with the largest micro-batch that fits there and that a step can fill."""
        most = math.ceil(self.estimate(1).rows_per_step)
        sizes = [2**power for power in range(most.bit_length())]  # up to `most`
        for stage in ZERO_STAGES:
            fitting = [found for size in sizes if (found := self.choice(stage, size)).refused is None]
            if fitting:
                return fitting[-1]
        return None

    def _refusal(self, stage: ZeroStage, peak: float) -> str | None:
        values = self.recipe.model_dump(mode="json")
        values["zero"]["stage"] = stage
        try:
            check_recipe(parse_config(Recipe, values, "zero"), self.profile)
        except ConfigError as error:
            return str(error)
        cores = max(2, usable_cores())  # as `cluster.local` tells Ray
        if not self.accelerator.is_gpu and self.workers > cores:
            return f"{self.workers} workers do not fit the {cores} CPUs of this machine"
        free = (1 - HEAD_ROOM) * self.accelerator.memory
        if peak > free:
            return f"takes {peak / 1e9:.1f} GB of {free / 1e9:.1f} GB (of {self.accelerator.name}'s less head room)"
        return None
