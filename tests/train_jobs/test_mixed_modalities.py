"""Under ZeRO every worker takes part in every step, whatever its batch holds."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from mmllm_core.config import CrossAttentionConfig, LinearConfig, ResamplerConfig
from mmllm_core.conversation import IMAGE_TOKEN_ID, Rendered
from mmllm_core.data.collate import WORTH_SHARING, collate_packed
from tests.train_jobs.engines import in_workers, tiny_model, tiny_recipe
from train_jobs.training_step import training_step
from train_jobs.zero import initialise_deepspeed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STAGES = (1, 2, 3)
CONNECTORS = (LinearConfig(), ResamplerConfig(n_queries=2), CrossAttentionConfig(every_k_layers=1, n_queries=2))
BEGINNING = list(range(1, WORTH_SHARING + 2))
"""Of every conversation; its last token predicts a supervised one, and is not shared."""


def work(rank: int, folder: Path) -> None:
    """Worker 0 sees an image at even steps and worker 1 at odd ones; without the other's part a step would not end."""
    losses: dict[str, list[float]] = {}
    for stage in STAGES:
        for config in CONNECTORS:
            recipe = tiny_recipe({"stage": stage})
            model = tiny_model(recipe, torch.bfloat16, config)
            engine = initialise_deepspeed(model, recipe)
            rng = random.Random(0)
            found = losses.setdefault(f"{config.kind} {stage}", [])
            for step in range(6):
                n_images = int(step % 2 == rank)
                shown = [IMAGE_TOKEN_ID] * model.connector.n_tokens(2) * n_images
                both = [
                    Rendered(
                        BEGINNING + images + words, [-100] * len(BEGINNING + images) + words, n_images * bool(images)
                    )
                    for images in (shown, [])
                    for words in [[rng.randrange(1, 64) for _ in range(8)]]
                ]
                batch = collate_packed(both, [np.ones((2, 8), dtype=np.float16)] * n_images)
                assert batch.packing is not None
                assert batch.packing.n_shared == WORTH_SHARING
                found.append(training_step(engine, [batch], step=step).loss)
    (folder / f"{rank}.json").write_text(json.dumps(losses))


def test_a_worker_with_text_alone_keeps_step_with_one_that_has_images(tmp_path: Path) -> None:
    in_workers(work, tmp_path, world=2)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other
    for connector in CONNECTORS:
        by_stage = [one[f"{connector.kind} {stage}"] for stage in STAGES]
        assert all(0 < loss < 20 for losses in by_stage for loss in losses)
        assert by_stage[0] == pytest.approx(by_stage[1], rel=0.02)
        assert by_stage[0] == pytest.approx(by_stage[2], rel=0.02)
