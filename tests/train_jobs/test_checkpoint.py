"""Checkpoints under every ZeRO stage: exact resume, other numbers of workers, and steps cut into micro-batches.

Workers are processes of their own with gloo between them; no Ray.
"""

import json
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmllm_core.errors import TrainingError
from train_jobs.checkpoint import RunState, check_manifest, load_checkpoint
from train_jobs.deepspeed_ops import build_ops, worker_environment
from train_jobs.optimizer_state import TrainedState


@dataclass(frozen=True)
class Part:
    """A part of a run: from one step to another, with so many workers."""

    zero: dict[str, Any]
    dtype: str
    start: int
    end: int
    source: Path | None
    target: Path
    micro_batch: int
    environment: dict[str, str]
    port: int
    world: int


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """DeepSpeed's op, compiled in a home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMLLM_HOME", str(tmp_path_factory.mktemp("home")))
        build_ops()
        return worker_environment(gpu=False)


def run(
    environment: dict[str, str],
    zero: dict[str, Any],
    dtype: str,
    steps: tuple[int, int],
    *,
    source: Path | None = None,
    world: int = 1,
    micro_batch: int = 6,
) -> tuple[list[float], Path]:
    """Losses of the steps, and the folder of the checkpoint at their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = Path(tempfile.mkdtemp())
    part = Part(zero, dtype, *steps, source, target, micro_batch, environment, port, world)
    torch.multiprocessing.spawn(_work, (part,), nprocs=world)
    return json.loads((target / "losses.json").read_text()), target


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds."""
    files = ("weights", "exp_avg", "exp_avg_sq")
    return {f"{file} {k}": v for file in files for k, v in load_file(folder / f"{file}.safetensors").items()}


STAGES = [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 2, "offload_optimizer": True}, {"stage": 3}]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("zero", STAGES, ids=lambda zero: "-".join(map(str, zero.values())))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    zero: dict[str, Any], dtype: str, environment: dict[str, str]
) -> None:
    whole, end = run(environment, zero, dtype, (0, 4))
    first, half = run(environment, zero, dtype, (0, 2))
    second, resumed = run(environment, zero, dtype, (2, 4), source=half)
    assert first + second == whole
    expected, found = tensors(end), tensors(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    if zero["stage"] in (2, 3) and dtype == "float32" and len(zero) == 1:
        wider, middle = run(environment, zero, dtype, (2, 3), source=half, world=2)
        last, other = run(environment, zero, dtype, (3, 4), source=middle)
        assert first + wider + last == pytest.approx(whole, abs=1e-5)
        moved = tensors(other)
        assert all(torch.allclose(expected[name], moved[name], atol=1e-5) for name in expected)
        cut, _ = run(environment, zero, dtype, (0, 4), micro_batch=2)
        assert cut == pytest.approx(whole, abs=1e-5), "accumulated over three micro-batches"


def _work(rank: int, part: Part) -> None:
    os.environ.update(part.environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(part.world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(part.port))
    import random

    import deepspeed
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM

    from mmllm_core.config import LinearConfig, Recipe, parse_config
    from mmllm_core.connectors import LmShape, build_connector
    from mmllm_core.conversation import IMAGE_TOKEN_ID, Rendered
    from mmllm_core.data.batching import Encoded, micro_batches
    from mmllm_core.language import add_adapter
    from mmllm_core.model import MultimodalLM
    from train_jobs.checkpoint import load_weights, save_checkpoint
    from train_jobs.optimizer_state import scatter
    from train_jobs.training_step import seed_step, training_step
    from train_jobs.zero import initialise_deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    values = {"name": "x", "profile": "embedded", "stage": "instruct", "steps": 4, "batch_size": 6, "workers": 1}
    values |= {"micro_batch": part.micro_batch, "zero": part.zero, "learning_rates": {"connector": 1e-3, "lm": 1e-3}}
    # Dropout shows whether random numbers go on too; cut into micro-batches, a step draws others.
    dropout = 0.1 if part.micro_batch == 6 and part.world == 1 and part.dtype == "bfloat16" else 0.0
    recipe = parse_config(Recipe, values | {"lora": {"rank": 2, "dropout": dropout}}, "test")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    dtype = getattr(torch, part.dtype)
    lm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).requires_grad_(False).to(dtype)
    assert recipe.lora is not None
    connector = build_connector(LinearConfig(), 8, LmShape(64, 2)).to(dtype)
    model = MultimodalLM(add_adapter(lm, recipe.lora), connector).train()
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
        rng = random.Random(step)
        samples = []
        for i in range(6):
            n_images = rng.randrange(2)
            ids = [IMAGE_TOKEN_ID] * 2 * n_images + [rng.randrange(1, 64) for _ in range(rng.randrange(4, 12))]
            labels = [token if token >= 0 else -100 for token in ids]
            features = np.random.default_rng([step, i]).normal(size=(2, 8)).astype(np.float16)
            samples.append(Encoded(Rendered(ids, labels, n_images), (features,) * n_images, f"{step}-{i}"))
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + step)
        seed_step(0, step, rank)
        batches = micro_batches(samples[rank :: part.world], recipe.batching, recipe.micro_batch)
        losses.append(training_step(engine, batches, step=step).loss)
    save_checkpoint(engine, manifest, part.target if rank == 0 else None, RunState(part.end, 0.0))
    if rank == 0:
        (part.target / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()


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
