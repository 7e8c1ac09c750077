"""The numerics of training that need no Ray."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mmllm_core.config import Recipe
from mmllm_core.errors import ConfigError
from train_jobs.progress import MetricsLog, read_metrics
from train_jobs.recipe import load_recipe, recipe_names
from train_jobs.train_clip import contrastive_loss
from train_jobs.train_loop import learning_rate


def unit(rows: int, seed: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_contrastive_loss_is_clips_own_when_every_image_has_its_own_caption() -> None:
    from open_clip import ClipLoss

    image, text, scale = unit(6, 0), unit(6, 1), torch.tensor(10.0)
    ours = contrastive_loss(image, text, torch.arange(6), scale)
    assert torch.allclose(ours, ClipLoss()(image, text, scale), atol=1e-6)


def test_contrastive_loss_does_not_push_images_of_one_caption_apart() -> None:
    text = torch.eye(8)[:2]
    image = text[[0, 0, 1]]
    assert contrastive_loss(image, text, torch.tensor([0, 0, 1]), torch.tensor(100.0)) < math.log(2)


def test_learning_rates_warm_up_peak_and_end_near_zero() -> None:
    recipe = load_recipe("embedded-instruct", {"steps": 20, "warmup_steps": 4})
    assert isinstance(recipe, Recipe)
    rates = [learning_rate(recipe, "lm", step) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(recipe.lora_learning_rate / 4)
    assert max(rates) == recipe.lora_learning_rate
    assert rates[-1] < 0.02 * recipe.lora_learning_rate
    assert max(learning_rate(recipe, "connector", s) for s in range(20)) == recipe.connector_learning_rate


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_validates(name: str) -> None:
    assert load_recipe(name).name == name


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="embedded-instruct"):
        load_recipe("nothing")


def test_a_stage_that_contradicts_its_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="align"):
        load_recipe("embedded-instruct", {"stage": "align"})


def test_a_half_written_line_of_a_metrics_log_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(step=1, loss=2.0)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": 2})[:5])
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
