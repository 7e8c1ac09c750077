"""CLIP towers between open_clip and Hugging Face: the same features, to the last bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm_core.config import PathSource, VisionConfig
from mmllm_core.errors import ExportError
from mmllm_core.interop.clip_weights import read_open_clip, write_open_clip
from mmllm_core.vision import ClipEncoder

MakeClip = Callable[..., Path]


def change_config(folder: Path, part: str, **changes: Any) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    target = config["model_cfg"]["vision_cfg"] if part == "vision_cfg" else config[part]
    target.update(changes)
    path.write_text(json.dumps(config))


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(32, 32), (40, 48), (99, 64), (17, 16)]
    return [Image.fromarray(generator.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@torch.inference_mode()
def features_of_both(folder: Path, layer: int) -> tuple[Tensor, Tensor]:
    """Features with CLS from our encoder, and from a CLIPVisionModel of the converted tower and its processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    encoder = ClipEncoder(VisionConfig(source=PathSource(path=folder), feature_layer=layer, cls_token=True), folder)
    ours = encoder.tower(encoder.preprocess(pictures()))
    tower = read_open_clip(folder)
    model = CLIPVisionModel(tower.config).eval()
    model.load_state_dict(
        {name if name in model.state_dict() else f"vision_model.{name}": t for name, t in tower.tensors.items()}
    )
    pixels = CLIPImageProcessorPil(**tower.processor)(pictures(), return_tensors="pt").pixel_values
    return ours, model(pixels, output_hidden_states=True).hidden_states[layer]


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("layer", [-1, -2])
def test_features_of_a_converted_tower_are_equal(quick_gelu: bool, layer: int, tiny_clip: MakeClip) -> None:
    ours, theirs = features_of_both(tiny_clip(quick_gelu=quick_gelu), layer)
    assert (ours - theirs).abs().max() < 1e-6 * ours.abs().max()


def test_an_odd_epsilon_is_carried_over(tiny_clip: MakeClip) -> None:
    folder = tiny_clip()
    usual, _ = features_of_both(folder, -1)
    change_config(folder, "vision_cfg", norm_kwargs={"eps": 0.1})
    ours, theirs = features_of_both(folder, -1)
    assert (ours - usual).abs().max() > 1e-3, "the epsilon makes no difference, and losing it would not show"
    assert (ours - theirs).abs().max() < 1e-6 * ours.abs().max()


@pytest.mark.parametrize(
    "preprocessing", [{"resize_mode": "squash"}, {"interpolation": "bilinear"}, {"mean": [0.1, 0.2, 0.3]}]
)
def test_preprocessing_is_carried_over(preprocessing: dict[str, Any], tiny_clip: MakeClip) -> None:
    folder = tiny_clip()
    change_config(folder, "preprocess_cfg", **preprocessing)
    ours, theirs = features_of_both(folder, -1)
    assert (ours - theirs).abs().max() < 1e-6 * ours.abs().max()


def test_what_goes_to_open_clip_and_back_is_what_it_was(tiny_clip: MakeClip, tmp_path: Path) -> None:
    folder = tiny_clip(quick_gelu=True)
    tower = read_open_clip(folder)
    write_open_clip(tmp_path, tower.config, tower.processor, tower.tensors)
    before, after = (load_file(f / "open_clip_model.safetensors") for f in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "visual.proj")
    again = read_open_clip(tmp_path)
    assert again.config.to_dict() | {"projection_dim": 16} == tower.config.to_dict()
    assert again.processor == tower.processor


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("vision_cfg", {"qk_norm": True}, "qk_norm"),
        ("vision_cfg", {"timm_model_name": "vit"}, "timm_model_name"),
        ("vision_cfg", {"attentional_pool": True}, "attentional_pool"),
        ("vision_cfg", {"layers": [1, 1, 1, 1]}, "ViT"),
        ("vision_cfg", {"image_size": [32, 16]}, "square"),
        ("preprocess_cfg", {"resize_mode": "longest"}, "longest"),
        ("preprocess_cfg", {"size": 64}, "64"),
    ],
)
def test_what_a_clip_vision_model_does_not_have_is_refused(
    part: str, change: dict[str, Any], named: str, tiny_clip: MakeClip
) -> None:
    folder = tiny_clip()
    change_config(folder, part, **change)
    with pytest.raises(ExportError, match=named):
        read_open_clip(folder)


def test_a_tensor_without_a_place_is_named(tiny_clip: MakeClip) -> None:
    path = tiny_clip() / "open_clip_model.safetensors"
    save_file(load_file(path) | {"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(3)}, path)
    with pytest.raises(ExportError, match="ls_1"):
        read_open_clip(path.parent)
