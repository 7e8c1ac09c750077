"""LLaVA import: what is no LLaVA checkpoint, or one that a bundle cannot hold, is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm_core.bundle import bundles_folder
from mmllm_core.config import Profile
from mmllm_core.errors import WeightsError
from mmllm_core.interop.llava import import_llava


def change_json(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def change_tensors(folder: Path, change: dict[str, Any]) -> None:
    """Put tensors into the checkpoint; None takes one away."""
    path = folder / "model.safetensors"
    state = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(state, path, metadata={"format": "pt"})


def assert_refused(folder: Path, profile: Profile, named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        import_llava(folder, profile=profile, name="refused")
    assert not (bundles_folder() / "refused").exists()


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, profile: Profile) -> None:
    assert_refused(tmp_path, profile, "not a LLaVA checkpoint")


def test_a_plain_lm_is_refused(tiny_lm: Any, tmp_path: Path, profile: Profile) -> None:
    tiny_lm("phi3").save_pretrained(tmp_path / "lm")
    assert_refused(tmp_path / "lm", profile, "its model_type is 'phi3'")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        ({"text_config": {"model_type": "mamba"}}, "mamba"),
        ({"vision_feature_layer": [-2, -1]}, "several layers"),
        ({"projector_hidden_act": "relu"}, "relu"),
        ({"model_type": "llava_next"}, "llava_next"),
        ({"vision_feature_select_strategy": "half"}, "config.json"),
    ],
)
def test_parts_that_mmllm_does_not_have_are_named(
    change: dict[str, Any], named: str, checkpoint: Any, profile: Profile
) -> None:
    _, folder = checkpoint()
    change_json(folder / "config.json", change)
    assert_refused(folder, profile, named)


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_layer_that_the_tower_lacks_is_refused(layer: int, checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    change_json(folder / "config.json", {"vision_feature_layer": layer})
    assert_refused(folder, profile, f"vision_feature_layer {layer}")


@pytest.mark.parametrize(
    "lost",
    [
        "language_model.model.layers.1.self_attn.o_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.encoder.layers.2.layer_norm1.bias",
        "multi_modal_projector.linear_2.weight",
    ],
)
def test_a_missing_tensor_is_named(lost: str, checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    change_tensors(folder, {lost: None})
    assert_refused(folder, profile, r"\.".join(lost.split(".")[-2:]))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("model.image_newline", "image_newline"),
        ("language_model.model.layers.0.extra", r"model\.layers\.0\.extra"),
        ("multi_modal_projector.linear_3.weight", "linear_3"),
    ],
)
def test_a_tensor_without_a_place_is_named(name: str, named: str, checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    change_tensors(folder, {name: torch.ones(3)})
    assert_refused(folder, profile, named)


def test_a_tensor_of_another_shape_is_named(checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    change_tensors(folder, {"language_model.model.norm.weight": torch.ones(3)})
    assert_refused(folder, profile, r"'model\.norm\.weight' has shape \(3,\)")


def test_a_shard_that_the_index_names_and_that_is_missing_is_named(checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00002.safetensors"}}))
    assert_refused(folder, profile, r"model-00002\.safetensors: missing")


def test_weights_that_are_no_safetensors_are_refused(checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    (folder / "model.safetensors").write_bytes(b"garbage" * 9)
    assert_refused(folder, profile, "safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"do_pad": True}, "pads"),
        ({"resample": 1}, "resample"),
        ({"crop_size": {"height": 16, "width": 16}}, "32x32"),
        ({"image_mean": None}, "image_mean"),
        ({"do_normalize": False}, "normalise"),
        ({"rescale_factor": 0.0078}, "scale"),
    ],
)
def test_preprocessing_that_would_give_other_pixels_is_refused(
    change: dict[str, Any], named: str, checkpoint: Any, profile: Profile
) -> None:
    _, folder = checkpoint()
    change_json(folder / "preprocessor_config.json", change)
    assert_refused(folder, profile, named)
