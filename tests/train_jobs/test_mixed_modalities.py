"""Under ZeRO every worker takes part in every step, whatever its batch holds."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.local import local_ray, quieten
from mmllm_core.config import Recipe, parse_config
from train_jobs.launch import Kept, Workers, run_workers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

RECIPE = {
    "name": "mixed",
    "profile": "embedded",
    "stage": "instruct",
    "steps": 6,
    "lora": {"rank": 2},
    "learning_rates": {"connector": 1e-3, "lm": 1e-3},
}


@pytest.fixture(scope="module", autouse=True)
def own_ray() -> Iterator[None]:
    quieten()
    with local_ray():
        yield


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_worker_with_text_alone_keeps_step_with_one_that_has_images(
    stage: int, compiled_ops: dict[str, str], tmp_path: Path
) -> None:
    """Worker 0 sees an image at even steps and worker 1 at odd ones; without the other's part a step would not end."""

    def work(_: dict[str, object]) -> None:
        os.environ.update(compiled_ops)
        import random

        import numpy as np
        import ray.train
        from transformers import LlamaConfig, LlamaForCausalLM

        from mmllm_core.config import CrossAttentionConfig, LinearConfig, ResamplerConfig
        from mmllm_core.connectors import LmShape, build_connector
        from mmllm_core.conversation import IMAGE_TOKEN_ID, Rendered
        from mmllm_core.data.collate import collate
        from mmllm_core.language import add_adapter
        from mmllm_core.model import MultimodalLM
        from train_jobs.training_step import training_step
        from train_jobs.zero import initialise_deepspeed

        rank, losses = ray.train.get_context().get_world_rank(), []
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
        configs = [LinearConfig(), ResamplerConfig(n_queries=2), CrossAttentionConfig(every_k_layers=1, n_queries=2)]
        for config in configs:
            torch.manual_seed(0)
            rng = random.Random(0)
            lm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).requires_grad_(False).bfloat16()
            connector = build_connector(config, 8, LmShape(64, 2)).bfloat16()
            engine = initialise_deepspeed(MultimodalLM(add_adapter(lm, settings.lora), connector).train(), settings)
            for step in range(6):
                n_images = int(step % 2 == rank)
                ids = [IMAGE_TOKEN_ID] * connector.n_tokens(2) * n_images + [rng.randrange(1, 64) for _ in range(8)]
                rendered = Rendered(ids, [i if i >= 0 else -100 for i in ids], n_images)
                batch = collate([rendered], [np.ones((2, 8), dtype=np.float16)] * n_images)
                losses.append(training_step(engine, [batch], step=step).loss)
        if rank == 0:
            (tmp_path / "losses.json").write_text(json.dumps(losses))

    settings = parse_config(Recipe, RECIPE | {"zero": {"stage": stage}}, "test")
    run_workers(work, {}, name=f"mixed-{stage}", workers=Workers(2), kept=Kept(str(tmp_path / "ray")))
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses) == 18
    assert all(0 < loss < 20 for loss in losses)
