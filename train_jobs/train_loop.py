"""What each Ray Train worker does: load, train under DeepSpeed, evaluate, save what was trained.

In: a `LoopConfig`. Out, reported to Ray: a checkpoint with the connector and the adapter (only what was trained),
and accuracy before and after. Does not know bundles or plots.
"""

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import ray.train

from mmllm_core.config import ConnectorConfig, Profile, Recipe
from mmllm_core.conversation import Message, Rendered, render
from mmllm_core.data import easy_vqa
from mmllm_core.data.mixture import training_samples
from mmllm_core.data.sample import Sample
from mmllm_core.errors import ConversationError, TrainingError
from train_jobs.launch import worker_device
from train_jobs.progress import MetricsLog, Stopwatch
from train_jobs.schedule import warmup_cosine
from train_jobs.stored_features import StoredFeatures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.connectors import Connector, LmShape
    from mmllm_core.data.collate import Batch
    from mmllm_core.model import MultimodalLM

Part = Literal["connector", "lm"]


@dataclass(frozen=True)
class LoopConfig:
    """All that a worker is told; picklable and the same for each."""

    recipe: dict[str, Any]
    profile: dict[str, Any]
    language_weights: str
    features: str
    fingerprint: str
    d_vision: int
    n_patches: int
    log: str
    environment: dict[str, str]


def train_loop(values: dict[str, Any]) -> None:
    """Train one stage; runs in a Ray Train worker."""
    config = LoopConfig(**values)
    os.environ.update(config.environment)  # DeepSpeed reads it when it is imported
    import torch

    recipe, profile = Recipe.model_validate(config.recipe), Profile.model_validate(config.profile)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    log = MetricsLog(Path(config.log)) if rank == 0 else None
    if log:
        log.write(phase="loading the LM")
    torch.manual_seed(recipe.seed)
    model, tokenizer = _build_model(recipe, profile, config)
    features = StoredFeatures(config.features, config.fingerprint, profile.vision.max_pixels)
    evaluator = _Evaluator(recipe, features, tokenizer, rank, world)
    if log:
        log.write(phase="asking before tuning")
    before = evaluator(model)
    if recipe.word_alignment_steps:
        _align_to_words(model, tokenizer, recipe, features)
    engine = _initialise_deepspeed(model, recipe)
    rendering = partial(
        render,
        tokenizer=tokenizer,
        n_image_tokens=model.connector.n_tokens(config.n_patches),
        max_length=min(profile.language.context_length, recipe.batching.pack_tokens or sys.maxsize),
        generation_prompt=False,
    )
    batches = _batches(recipe, features, rendering, rank, world)
    watch = Stopwatch()
    for step in range(recipe.steps):
        batch = next(batches)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, group["name"], step)
        loss = _step(engine, batch, world)
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the loss is {loss}: lower the learning rates in the recipe")
        if log:
            log.write(step=step + 1, loss=loss, seconds=watch.seconds, tokens=int(batch.attention_mask.sum()) * world)
    if log:
        log.write(phase="asking after tuning")
    after = evaluator(model)
    accuracy = {"before": before, "after": after, "baseline": evaluator.baseline()}
    metrics = {"loss": loss, "seconds": watch.seconds, "accuracy": accuracy}
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            _save_trained(model, Path(folder))
        checkpoint = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report(metrics, checkpoint=checkpoint)


def learning_rate(recipe: Recipe, part: Part, step: int) -> float:
    """Learning rate of a part of the model at a step; see `train_jobs.schedule`."""
    peak = recipe.lora_learning_rate if part == "lm" else recipe.connector_learning_rate
    return peak * warmup_cosine(step, recipe.warmup_steps, recipe.steps)


def load_trained(
    folder: Path, config: ConnectorConfig, d_vision: int, lm: "LmShape"
) -> tuple["Connector", Path | None]:
    """Read a checkpoint: the connector, and the adapter's folder if one was trained."""
    from safetensors.torch import load_file

    from mmllm_core.connectors import build_connector

    connector = build_connector(config, d_vision, lm)
    connector.load_state_dict(load_file(folder / "connector.safetensors"))
    adapter = folder / "adapter"
    return connector, adapter if adapter.is_dir() else None


class _Evaluator:
    """Asks this worker's share of the held-out questions and adds up the shares of all."""

    def __init__(self, recipe: Recipe, features: StoredFeatures, tokenizer: Any, rank: int, world: int):
        limit = recipe.evaluation_questions
        self._questions = easy_vqa.held_out_questions(easy_vqa.fetch(), limit, recipe.seed) if limit else []
        self._share = self._questions[rank::world]
        self._features = features
        self._tokenizer = tokenizer
        self._world = world

    def __call__(self, model: "MultimodalLM") -> dict[str, list[int]]:
        import torch.distributed as dist

        from mmllm_core.evaluation.accuracy import (
            answer_questions,
            merge_scores,
            score_by_kind,
            scores_to_json,
        )

        if not self._questions:
            return {}
        model.eval()
        answers = answer_questions(model, self._tokenizer, self._share, self._features)
        model.train()
        shares: list[Any] = [None] * self._world
        dist.all_gather_object(shares, score_by_kind(self._share, answers))
        return scores_to_json(merge_scores(shares))

    def baseline(self) -> dict[str, list[int]]:
        """The commonest-answer baseline on the same questions."""
        from mmllm_core.evaluation.accuracy import commonest_answer_baseline, scores_to_json

        return scores_to_json(commonest_answer_baseline(self._questions)) if self._questions else {}


def _build_model(
    recipe: Recipe, profile: Profile, config: LoopConfig
) -> tuple["MultimodalLM", "PreTrainedTokenizerBase"]:
    import torch

    from mmllm_core.connectors import LmShape, build_connector
    from mmllm_core.language import add_adapter, load_language_model, load_tokenizer
    from mmllm_core.model import MultimodalLM

    folder, device = Path(config.language_weights), worker_device()
    lm: Any = load_language_model(profile.language, folder, device)
    embeddings = lm.get_input_embeddings().weight
    connector = build_connector(
        profile.connector, config.d_vision, LmShape.of(lm.config), output_std=float(embeddings.float().std())
    )
    if recipe.lora:
        lm = add_adapter(lm, recipe.lora)
    model = MultimodalLM(lm, connector.to(device, getattr(torch, profile.language.dtype)))
    return model.train(), load_tokenizer(folder)


def _align_to_words(model: "MultimodalLM", tokenizer: Any, recipe: Recipe, features: StoredFeatures) -> None:
    """Every worker does the same, so that all start from equal weights."""
    import torch

    from mmllm_core.word_alignment import align_to_words

    captioned = [(image.image, image.caption) for image in easy_vqa.load_split(easy_vqa.fetch(), "train")]
    found = [(features(path), caption) for path, caption in captioned if caption]
    dtype = model.connector.dtype
    align_to_words(
        model.connector.float(),  # bf16 would round small updates away
        torch.from_numpy(np.stack([feature for feature, _ in found])).to(worker_device()),
        [caption for _, caption in found],
        model.causal_lm.get_input_embeddings().weight.detach(),
        tokenizer,
        steps=recipe.word_alignment_steps,
        learning_rate=recipe.word_alignment_learning_rate,
        seed=recipe.seed,
    )
    model.connector.to(dtype)


def _initialise_deepspeed(model: "MultimodalLM", recipe: Recipe) -> Any:
    import deepspeed
    import torch

    parts: tuple[Part, ...] = ("connector", "lm") if recipe.lora else ("connector",)
    groups = [
        {"params": list(model.parameters_of(part)), "name": part, "lr": 0.0, "weight_decay": recipe.weight_decay}
        for part in parts
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, betas=(0.9, 0.99)),
        config={
            "train_micro_batch_size_per_gpu": recipe.micro_batch,
            "gradient_clipping": recipe.max_grad_norm,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": recipe.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return engine


def _step(engine: Any, batch: "Batch", world: int) -> float:
    """One optimizer step; returns the loss per supervised token over all workers.

    DeepSpeed averages gradients over workers, and workers hold different numbers of supervised tokens: each scales
    its sum so that the average is the gradient of the global mean.
    """
    import torch
    import torch.distributed as dist

    batch = batch.to(engine.device)
    n_supervised = torch.tensor(float(batch.n_supervised), device=engine.device)  # NCCL reduces on GPUs alone
    dist.all_reduce(n_supervised)
    loss_sum = engine(batch.input_ids, batch.attention_mask, batch.labels, batch.features, batch.position_ids)
    engine.backward(loss_sum * (world / n_supervised.item()))
    engine.step()
    total = loss_sum.detach().clone()
    dist.all_reduce(total)
    return float(total / n_supervised)


def _batches(
    recipe: Recipe,
    features: StoredFeatures,
    rendering: Callable[[Sequence[Message]], Rendered],
    rank: int,
    world: int,
) -> Iterator["Batch"]:
    """This worker's batches: of the one stream, each world-th conversation is its own."""
    from mmllm_core.data.batching import Encoded, batches

    share = training_samples(recipe.data, recipe.seed, start=rank, step=world)

    def encode(sample: Sample) -> Encoded:
        try:
            return Encoded(rendering(sample.messages), tuple(features(image) for image in sample.images))
        except ConversationError as error:
            limits = "the profile's language.context_length and the recipe's batching.pack_tokens"
            raise TrainingError(f"sample '{sample.id}': {error}; {limits} set the limit") from error

    return batches(map(encode, share), recipe.batching, micro_batch=recipe.micro_batch, seed=recipe.seed)


def _save_trained(model: "MultimodalLM", folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from mmllm_core.bundle import save_adapter

    state = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in model.connector.state_dict().items()}
    save_file(state, folder / "connector.safetensors")
    if hasattr(model.lm, "peft_config"):
        save_adapter(model.lm, folder / "adapter")
