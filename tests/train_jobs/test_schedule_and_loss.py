"""The numerics of training that need no Ray."""

import math

import pytest
import torch
from torch import nn

from mmllm_core.config import Recipe
from mmllm_core.errors import ConfigError
from train_jobs.checkpoint import RunState
from train_jobs.recipe import load_recipe, recipe_names
from train_jobs.schedule import learning_rates, rate_share
from train_jobs.train_clip import contrastive_loss


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
    rates = [learning_rates(recipe, step) for step in range(recipe.steps)]
    lm = [rate["lm"] for rate in rates]
    assert lm[0] == pytest.approx(recipe.learning_rates.lm / 4)
    assert max(lm) == recipe.learning_rates.lm
    assert lm[-1] < 0.02 * recipe.learning_rates.lm
    assert max(rate["connector"] for rate in rates) == recipe.learning_rates.connector
    assert all("vision" not in rate for rate in rates)


def test_schedules_differ_after_the_warm_up() -> None:
    shares = {name: [rate_share(name, step, 2, 10) for step in range(10)] for name in ("cosine", "linear", "constant")}
    assert all(share[:2] == [0.5, 1.0] for share in shares.values())
    assert shares["constant"][2:] == [1.0] * 8
    assert shares["linear"][6] == pytest.approx(0.5)
    assert shares["cosine"][6] == pytest.approx(0.5)
    assert shares["cosine"][4] > shares["linear"][4]


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_validates(name: str) -> None:
    assert load_recipe(name).name == name


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="embedded-instruct"):
        load_recipe("nothing")


def test_a_stage_that_contradicts_its_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="align"):
        load_recipe("embedded-instruct", {"stage": "align"})


def test_the_smoothed_loss_is_without_bias_and_steps_that_were_left_out_do_not_count_in_it() -> None:
    state = RunState(step=0, loss_ema=0.0, before=["red"])
    for loss in (math.nan, 2.0, 2.0, math.inf, 2.0):
        state = state.after_step(loss, seconds=0.5)
    assert state == RunState(step=5, loss_ema=pytest.approx(2.0), before=["red"], seconds=2.5)
    assert 1.0 < state.after_step(1.0, seconds=0.5).loss_ema < 2.0
