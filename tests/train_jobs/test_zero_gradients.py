"""Every ZeRO stage takes the steps that one process takes, with all of the model trained and gradients checkpointed.

The workers' batches are packed, the one process's padded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm_core.config import LoraConfig, MlpConfig, PathSource, VisionConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IMAGE_TOKEN_ID, Rendered
from mmllm_core.data.collate import WORTH_SHARING, Batch, collate, collate_packed
from mmllm_core.language import add_adapter, unfreeze
from mmllm_core.model import MultimodalLM
from mmllm_core.vision import ClipEncoder
from tests.conftest import TinyLM
from tests.train_jobs.engines import in_workers
from train_jobs.zero import import_deepspeed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 3
RATE = 0.02
CASES = ((1, True), (2, False), (3, True), (3, False))
"""ZeRO's stage, and whether an adapter is trained or all of the LM."""


def build(lm_folder: Path, clip_folder: Path, *, adapter: bool) -> tuple[MultimodalLM, ClipEncoder]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lm: Any = AutoModelForCausalLM.from_pretrained(lm_folder)
    connector = build_connector(MlpConfig(), 32, LmShape(64, 2))
    if adapter:
        lm = add_adapter(lm.requires_grad_(False), LoraConfig(rank=4))
    else:
        unfreeze(lm)
    clip = ClipEncoder(VisionConfig(source=PathSource(path=clip_folder)), clip_folder)
    clip.tower.unfreeze()
    model = MultimodalLM(lm, connector, clip.tower).train()
    model.checkpoint_gradients()
    return model, clip


BEGINNING = list(range(1, WORTH_SHARING + 2))
"""Of every conversation; its last token predicts a supervised one, and is not shared."""


def batch_of(step: int, worker: int, clip: ClipEncoder, *, packed: bool) -> tuple[Batch, torch.Tensor | None]:
    """Worker 0 sees an image at even steps, worker 1 at odd ones; worker 1 has nothing supervised at step 1.

    Beside that stands a conversation of text, of which nothing is supervised either then.
    """
    rng = np.random.default_rng([step, worker])
    n_images = int(step % 2 == worker)
    conversations = []
    for shown in (n_images, 0):
        words = rng.integers(1, 300, 6 + worker + shown).tolist()
        before = BEGINNING + [IMAGE_TOKEN_ID] * 16 * shown
        supervised = [-100] * len(words) if (step, worker) == (1, 1) else words
        conversations.append(Rendered(before + words, [-100] * len(before) + supervised, shown))
    image = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    features = [np.zeros((1, 1), np.float16)] * n_images
    batch = (collate_packed if packed else collate)(conversations, features)
    return batch, clip.preprocess([image]) if n_images else None


def n_supervised(step: int, clip: ClipEncoder) -> int:
    return sum(batch_of(step, worker, clip, packed=True)[0].n_supervised for worker in range(2))


def loss_sum(model: Any, step: int, worker: int, clip: ClipEncoder, *, packed: bool) -> torch.Tensor:
    batch, pixels = batch_of(step, worker, clip, packed=packed)
    return model(batch.input_ids, batch.attention_mask, batch.labels, None, batch.packing, pixels)


def one_process(lm_folder: Path, clip_folder: Path, *, adapter: bool) -> list[float]:
    """Losses of plain steps over both workers' batches, padded."""
    model, clip = build(lm_folder, clip_folder, adapter=adapter)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(loss_sum(model, step, worker, clip, packed=False) for worker in range(2)) / n_supervised(step, clip)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def under_zero(worker: int, lm_folder: Path, clip_folder: Path, stage: int, *, adapter: bool) -> list[float]:
    """Losses of the same steps, shared by two workers that pack their batches."""
    model, clip = build(lm_folder, clip_folder, adapter=adapter)
    engine, *_ = import_deepspeed("cpu").initialize(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,  # it would clip to 1 by itself
            # ZeRO-3 would keep parameters as small as these whole on every worker.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    losses = []
    for step in range(STEPS):
        loss = loss_sum(engine, step, worker, clip, packed=True) / n_supervised(step, clip)
        engine.backward(loss * 2)  # DeepSpeed averages over workers
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    return losses


def work(worker: int, folders: tuple[Path, Path, Path]) -> None:
    *models, results = folders
    found = [under_zero(worker, *models, stage, adapter=adapter) for stage, adapter in CASES]
    if worker == 0:
        np.save(results / "losses.npy", np.array(found))


def test_losses_equal_those_of_one_process(tiny_lm: TinyLM, tiny_clip: Callable[..., Path], tmp_path: Path) -> None:
    lm_folder, clip_folder = tmp_path / "lm", tiny_clip()
    tiny_lm("phi").save_pretrained(lm_folder)
    expected = {adapter: one_process(lm_folder, clip_folder, adapter=adapter) for adapter in (False, True)}
    assert all(abs(losses[0] - losses[-1]) > 0.01 for losses in expected.values())
    in_workers(work, (lm_folder, clip_folder, tmp_path), world=2)
    for (stage, adapter), found in zip(CASES, np.load(tmp_path / "losses.npy"), strict=True):
        assert np.allclose(found, expected[adapter], rtol=1e-5), f"stage {stage}, adapter {adapter}"
