"""DeepSpeed engines of a tiny model in processes of their own, with gloo between them, no Ray and no compiler."""

import os
import random
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmllm_core.config import ConnectorConfig, LinearConfig, Recipe, parse_config
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IMAGE_TOKEN_ID, Rendered
from mmllm_core.data.batching import Encoded
from mmllm_core.language import add_adapter
from mmllm_core.model import MultimodalLM
from train_jobs.zero import import_deepspeed

Work = Callable[[int, Any], None]
BATCH_SIZE = 6


def in_workers(work: Work, argument: Any, *, world: int) -> None:
    """Run `work(rank, argument)` in as many processes, which can call `deepspeed.initialize`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_prepare, (work, argument, world, port), nprocs=world)


def _prepare(rank: int, work: Work, argument: Any, world: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["PATH"] = ""  # what would be compiled is an error
    torch.set_num_threads(1)
    import_deepspeed("cpu").init_distributed("gloo")
    work(rank, argument)
    torch.distributed.barrier()


def tiny_recipe(zero: dict[str, Any], micro_batch: int = BATCH_SIZE, dropout: float = 0.0) -> Recipe:
    """An instruct stage of four steps."""
    values = {"name": "x", "profile": "embedded", "stage": "instruct", "steps": 4, "batch_size": BATCH_SIZE}
    values |= {"workers": 1, "micro_batch": micro_batch, "zero": zero, "lora": {"rank": 2, "dropout": dropout}}
    return parse_config(Recipe, values | {"learning_rates": {"connector": 1e-3, "lm": 1e-3}}, "test")


def tiny_model(recipe: Recipe, dtype: torch.dtype, config: ConnectorConfig = LinearConfig()) -> MultimodalLM:
    """Two layers of 64, with the recipe's adapter and a connector of 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    lm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).requires_grad_(False).to(dtype)
    assert recipe.lora is not None
    connector = build_connector(config, 8, LmShape(64, 2)).to(dtype)
    return MultimodalLM(add_adapter(lm, recipe.lora), connector).train()


def conversations(step: int) -> list[Encoded]:
    """A step's, of different lengths, some of them with an image."""
    rng = random.Random(step)
    samples = []
    for i in range(BATCH_SIZE):
        n_images = rng.randrange(2)
        ids = [IMAGE_TOKEN_ID] * 2 * n_images + [rng.randrange(1, 64) for _ in range(rng.randrange(4, 12))]
        labels = [token if token >= 0 else -100 for token in ids]
        features = np.random.default_rng([step, i]).normal(size=(2, 8)).astype(np.float16)
        samples.append(Encoded(Rendered(ids, labels, n_images), (features,) * n_images, f"{step}-{i}"))
    return samples
