"""The vision tower inside the model: frozen it gives what is stored, trained it takes part in every step."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmllm_core.config import CrossAttentionConfig, LinearConfig, MlpConfig, PathSource, ResamplerConfig, VisionConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from mmllm_core.errors import WeightsError
from mmllm_core.model import MultimodalLM
from mmllm_core.vision import CLIP_CONFIG, CLIP_WEIGHTS, ClipEncoder
from mmllm_core.vision_tower import save_vision
from tests.conftest import TinyLM

MakeClip = Callable[..., Path]
CONNECTORS = [MlpConfig(), LinearConfig(), ResamplerConfig(n_queries=2), CrossAttentionConfig(every_k_layers=1)]


def encoder(folder: Path, **settings: Any) -> ClipEncoder:
    return ClipEncoder(VisionConfig(source=PathSource(path=folder), **settings), folder)


def pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)) for _ in range(n)]


def model_with(
    lm: Any, clip: ClipEncoder | None, config: Any = CONNECTORS[0], *, trained: bool = False
) -> MultimodalLM:
    torch.manual_seed(0)
    connector = build_connector(config, 32, LmShape(64, 2))
    for name, parameter in connector.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 0.7)
    if clip and trained:
        clip.tower.unfreeze()
    return MultimodalLM(lm.requires_grad_(False), connector, clip.tower if clip else None).train()


def batch(model: MultimodalLM, n_images: int, n_features: int = 16) -> tuple[torch.Tensor, ...]:
    """One conversation with images, all words supervised: ids, mask, labels."""
    ids = [IMAGE_TOKEN_ID] * model.connector.n_tokens(n_features) * n_images + [5, 6, 7, 8]
    labels = [i if i >= 0 else IGNORE_INDEX for i in ids]
    return torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64), torch.tensor([labels])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONNECTORS, ids=lambda c: c.kind)
def test_a_frozen_tower_gives_exactly_what_is_stored(
    config: Any, dtype: torch.dtype, tiny_lm: TinyLM, tiny_clip: MakeClip
) -> None:
    clip = encoder(tiny_clip())
    stored = torch.from_numpy(clip.encode(pictures(2)).astype(np.float32))
    # Cast as a whole, as DeepSpeed does.
    real_time = model_with(tiny_lm("llama"), clip, config).to(dtype)
    looked_up = model_with(tiny_lm("llama"), None, config).to(dtype)
    pixels = clip.preprocess(pictures(2))
    assert torch.equal(real_time.see(pixels), stored)
    found = real_time(*batch(real_time, 2), None, pixels=pixels)
    assert torch.equal(found, looked_up(*batch(looked_up, 2), stored))
    assert not any("vision" in name for name in real_time.state_dict())
    assert list(real_time.parameters_of("vision")) == []


def test_a_trained_tower_is_not_rounded_for_storage(tiny_lm: TinyLM, tiny_clip: MakeClip) -> None:
    clip = encoder(tiny_clip())
    model = model_with(tiny_lm("llama"), clip, trained=True)
    pixels = clip.preprocess(pictures(1))
    seen = model.see(pixels)
    assert torch.equal(seen, clip.tower(pixels))
    assert not torch.equal(seen, seen.half().float())
    assert not torch.equal(model.train().see(pixels), seen.half().float())


@pytest.mark.parametrize(
    ("settings", "used_blocks", "unused"),
    [
        ({"feature_layer": -1}, {0, 1, 2}, {"ln_post", "proj"}),
        ({"feature_layer": -2, "cls_token": True}, {0, 1}, {"ln_post", "proj"}),
        ({"feature_layer": -3, "merge": 2}, {0}, {"ln_post", "proj"}),
    ],
)
def test_what_features_depend_on_is_trained_and_nothing_else(
    settings: dict[str, Any], used_blocks: set[int], unused: set[str], tiny_lm: TinyLM, tiny_clip: MakeClip
) -> None:
    clip = encoder(tiny_clip(), **settings)
    model = model_with(tiny_lm("llama"), clip, trained=True)
    names = {n.removeprefix("vision.visual.") for n in model.trainable_names() if n.startswith("vision.")}
    assert {int(n.split(".")[2]) for n in names if n.startswith("transformer.")} == used_blocks
    assert {"conv1.weight", "positional_embedding", "class_embedding"} <= names
    assert not {n.split(".")[0] for n in names} & unused
    assert len(list(model.parameters_of("vision"))) == len(names)
    pixels = clip.preprocess(pictures(1))
    model(*batch(model, 1, clip.n_patches), None, pixels=pixels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters_of("vision"))
    assert all(p.grad is None for p in clip.tower.parameters() if not p.requires_grad)


@pytest.mark.parametrize("config", CONNECTORS, ids=lambda c: c.kind)
def test_the_tower_takes_part_in_steps_on_text_alone(config: Any, tiny_lm: TinyLM, tiny_clip: MakeClip) -> None:
    clip = encoder(tiny_clip())
    model = model_with(tiny_lm("llama"), clip, config, trained=True)
    calls: list[int] = []
    clip.tower.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    loss = model(*batch(model, 0), None)
    loss.backward()
    trained = [*model.parameters_of("vision"), *model.parameters_of("connector")]
    assert calls == [1]
    assert all(p.grad is not None and not p.grad.any() for p in trained), "it takes part, and nothing moves it"
    assert torch.equal(loss, model_with(tiny_lm("llama"), None, config)(*batch(model, 0), None))
    assert model.eval()(*batch(model, 0), None) == loss
    assert calls == [1], "an evaluation needs no blank image"


def test_a_trained_tower_learns(tiny_lm: TinyLM, tiny_clip: MakeClip) -> None:
    clip = encoder(tiny_clip())
    model = model_with(tiny_lm("llama"), clip, trained=True)
    optimizer = torch.optim.AdamW(model.parameters_of("vision"), lr=1e-2)
    pixels = clip.preprocess(pictures(1))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(*batch(model, 1), None, pixels=pixels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_contradictory_inputs_are_errors(tiny_lm: TinyLM, tiny_clip: MakeClip) -> None:
    clip = encoder(tiny_clip())
    pixels, features = clip.preprocess(pictures(1)), torch.randn(1, 16, 32)
    blind, seeing = model_with(tiny_lm("llama"), None), model_with(tiny_lm("llama"), clip)
    with pytest.raises(ValueError, match="without a vision tower"):
        blind(*batch(blind, 1), None, pixels=pixels)
    with pytest.raises(ValueError, match="give pixels alone"):
        seeing(*batch(seeing, 1), features, pixels=pixels)
    with pytest.raises(ValueError, match="image positions"):
        seeing(*batch(seeing, 2), None, pixels=pixels)
    assert seeing(*batch(seeing, 1), features) > 0
    training = model_with(tiny_lm("llama"), clip, trained=True)
    with pytest.raises(ValueError, match="give pixels alone"):
        training(*batch(training, 1), features)
    with pytest.raises(ValueError, match="image positions"):
        training(*batch(training, 1), None)


def whole_clip(folder: Path) -> Path:
    """Add to the tiny vision tower what a CLIP has beside it, in half precision."""
    state = load_file(folder / CLIP_WEIGHTS)
    save_file(state | {"text.token_embedding.weight": torch.randn(8, 16).half()}, folder / CLIP_WEIGHTS)
    return folder


def test_a_saved_tower_is_loaded_as_it_was_trained_under_another_fingerprint(
    tiny_clip: MakeClip, tmp_path: Path
) -> None:
    source = whole_clip(tiny_clip())
    trained = encoder(source)
    before = trained.encode(pictures(1))
    trained.tower.unfreeze()
    with torch.no_grad():
        for parameter in trained.tower.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    save_vision(trained.tower, source, tmp_path / "trained")
    again = encoder(tmp_path / "trained")
    assert np.array_equal(again.encode(pictures(1)), trained.encode(pictures(1)))
    assert not np.allclose(again.encode(pictures(1)), before, atol=0.1)
    assert again.fingerprint != encoder(source).fingerprint
    original, saved = (load_file(folder / CLIP_WEIGHTS) for folder in (source, tmp_path / "trained"))
    assert {k: v.dtype for k, v in original.items()} == {k: v.dtype for k, v in saved.items()}
    unchanged = {k for k, v in original.items() if torch.equal(v, saved[k])}
    assert unchanged >= {"text.token_embedding.weight", "visual.proj", "visual.transformer.resblocks.2.ln_1.weight"}
    assert "visual.conv1.weight" not in unchanged
    assert (tmp_path / "trained" / CLIP_CONFIG).read_text() == (source / CLIP_CONFIG).read_text()


def test_an_untrained_tower_saves_to_equal_weights(tiny_clip: MakeClip, tmp_path: Path) -> None:
    source = tiny_clip()
    save_vision(encoder(source).tower, source, tmp_path / "same")
    original, saved = (load_file(folder / CLIP_WEIGHTS) for folder in (source, tmp_path / "same"))
    assert all(torch.equal(original[key], saved[key]) for key in original | saved)


def test_a_tower_is_not_saved_over_another_architecture(tiny_clip: MakeClip, tmp_path: Path) -> None:
    tower = encoder(tiny_clip()).tower
    other = tiny_clip(seed=1)
    state = load_file(other / CLIP_WEIGHTS)
    save_file({k: v for k, v in state.items() if "resblocks.2" not in k}, other / CLIP_WEIGHTS)
    with pytest.raises(WeightsError, match="another vision tower"):
        save_vision(tower, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.lengthy
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "frozen lm"])
@pytest.mark.parametrize("config", CONNECTORS, ids=lambda c: c.kind)
@pytest.mark.parametrize("family", ["llama", "phi3", "phi"])
def test_checkpointed_gradients_equal_those_of_kept_activations(
    family: str, config: Any, adapter: bool, tiny_lm: TinyLM, tiny_clip: MakeClip
) -> None:
    from mmllm_core.config import LoraConfig
    from mmllm_core.language import add_adapter

    def step(checkpointed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        clip = encoder(tiny_clip())
        model = model_with(tiny_lm(family), clip, config, trained=True)
        if adapter:
            torch.manual_seed(0)
            model.lm = add_adapter(model.lm, LoraConfig(rank=4)).train()
            for name, parameter in model.lm.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter)
        if checkpointed:
            model.checkpoint_gradients()
        runs: list[str] = []
        watched = {"lm": model.causal_lm.base_model.layers[0], "vision": clip.tower.visual.transformer.resblocks[0]}
        for name, module in watched.items():
            module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
        loss = model(*batch(model, 1), None, pixels=clip.preprocess(pictures(1)))
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        assert set(gradients) == model.trainable_names()
        return loss.detach(), gradients, len(runs)

    loss, gradients, runs = step(checkpointed=False)
    again, gradients_again, runs_again = step(checkpointed=True)
    assert (runs, runs_again) == (2, 4), "a block runs again in the backward pass"
    assert torch.equal(again, loss)
    assert all(torch.allclose(gradients_again[name], gradients[name], rtol=1e-6, atol=1e-7) for name in gradients)


STARTED = """
import sys
from pathlib import Path
from mmllm_core.config import PathSource, VisionConfig
from mmllm_core.vision import ClipEncoder

folder = Path(sys.argv[1])
ClipEncoder(VisionConfig(source=PathSource(path=folder)), folder)
print("transformers" in sys.modules)
import transformers
print(transformers.__name__)
"""


def test_clip_starts_without_transformers_and_leaves_it_to_others(tiny_clip: MakeClip) -> None:
    done = subprocess.run([sys.executable, "-c", STARTED, tiny_clip()], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "transformers"]
