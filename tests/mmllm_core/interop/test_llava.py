"""LLaVA import: the bundle's logits are the original's, on tiny random models of the real classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmllm_core.config import PathSource, Profile
from mmllm_core.conversation import IMAGE_TOKEN_ID
from mmllm_core.errors import WeightsError
from mmllm_core.interop.llava import import_llava
from mmllm_core.models.profile import load_profile
from tests.conftest import tiny_lm_config

IMAGE_ID = 399
SIZE = 32


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    embedded = load_profile("embedded")
    language = embedded.language.model_copy(
        update={"source": PathSource(path=tmp_path), "quantization": "none", "dtype": "float32"}
    )
    return embedded.model_copy(update={"language": language})


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Any) -> Callable[..., tuple[Any, Path]]:
    """Save a random LLaVA with its tokenizer and image processor; gives the model and the folder."""

    def build(
        lm: str = "phi3",
        *,
        layer: int = -2,
        strategy: str = "default",
        act: str = "quick_gelu",
        old_keys: bool = True,
        bias: bool = True,
        **lm_changes: Any,
    ) -> tuple[Any, Path]:
        from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=8,
            projection_dim=16,
            hidden_act=act,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=tiny_lm_config(lm, **lm_changes),
            image_token_index=IMAGE_ID,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            multimodal_projector_bias=bias,
            tie_word_embeddings=lm_changes.get("tie_word_embeddings", False),
        )
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        folder = tmp_path / f"llava-{lm}-{layer}-{strategy}-{act}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
            folder
        )
        _rename_keys(folder / "model.safetensors", old_keys)
        return model, folder

    return build


def _rename_keys(path: Path, old: bool) -> None:
    """Name the tensors as checkpoints on the hub do (old), or as the module tree does (new)."""
    renamed = {}
    for name, tensor in load_file(path).items():
        bare = name.removeprefix("model.")
        if bare.startswith("language_model.model."):
            bare = bare.replace("language_model.model.", "language_model.", 1)
        bare = bare.replace("language_model.lm_head", "lm_head")
        if old:
            bare = bare.replace("language_model.", "language_model.model.") if bare.startswith("language") else bare
            bare = f"language_model.{bare}" if bare.startswith("lm_head") else bare
        elif not bare.startswith("lm_head"):
            bare = f"model.{bare}"
        renamed[bare] = tensor
    save_file(renamed, path, metadata={"format": "pt"})


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("lm", ["phi3", "llama"])
@pytest.mark.parametrize(
    ("layer", "strategy", "act", "old_keys"),
    [(-2, "default", "quick_gelu", True), (-1, "full", "gelu", False), (-2, "full", "quick_gelu", False)],
)
def test_logits_and_greedy_text_equal_the_originals(
    lm: str, layer: int, strategy: str, act: str, old_keys: bool, checkpoint: Any, profile: Profile
) -> None:
    from transformers import CLIPImageProcessor

    original, folder = checkpoint(lm, layer=layer, strategy=strategy, act=act, old_keys=old_keys)
    bundle = import_llava(folder, profile=profile, name="imported")
    model, encoder = bundle.load_model(), bundle.load_vision()

    image = picture()
    pixels = CLIPImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    preprocessed = encoder._preprocess(image).unsqueeze(0)
    assert (pixels - preprocessed).abs().max() < 0.05, "both preprocess alike, up to the resampling library"
    features = encoder._features(preprocessed).float()  # before fp16, which is not what is compared
    n = features.shape[1]
    ids = torch.tensor([[5, 20, *[IMAGE_TOKEN_ID] * n, 30, 31, 32]])
    original_ids = ids.masked_fill(ids == IMAGE_TOKEN_ID, IMAGE_ID)
    with torch.inference_mode():
        expected = original(input_ids=original_ids, pixel_values=preprocessed).logits
        found = model.lm(inputs_embeds=model.embed(ids, features)).logits
    assert (expected - found).abs().max() < 1e-4

    mask = torch.ones_like(ids)
    new = model.generate(ids, mask, features, max_new_tokens=8, stop_ids=[0])
    reference = original.generate(
        input_ids=original_ids, attention_mask=mask, pixel_values=preprocessed, max_new_tokens=8, do_sample=False
    )
    assert new[0].tolist() == reference[0, ids.shape[1] :].tolist()


def test_a_folder_that_is_no_llava_checkpoint_is_refused(tmp_path: Path, profile: Profile) -> None:
    with pytest.raises(WeightsError, match="not a LLaVA checkpoint"):
        import_llava(tmp_path, profile=profile, name="nothing")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        ({"text_config": {"model_type": "mamba"}}, "mamba"),
        ({"vision_feature_layer": [-2, -1]}, "several layers"),
        ({"projector_hidden_act": "relu"}, "relu"),
        ({"model_type": "llava_next"}, "llava_next"),
    ],
)
def test_parts_that_mmllm_does_not_have_are_named(
    change: dict[str, Any], named: str, checkpoint: Any, profile: Profile
) -> None:
    _, folder = checkpoint()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=named):
        import_llava(folder, profile=profile, name="refused")


def test_a_missing_tensor_is_named(checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    path = folder / "model.safetensors"
    state = load_file(path)
    lost = next(name for name in state if name.endswith("o_proj.weight"))
    save_file({name: tensor for name, tensor in state.items() if name != lost}, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"o_proj\.weight"):
        import_llava(folder, profile=profile, name="refused")


def logits_differ_by(original: Any, folder: Path, profile: Profile) -> float:
    """Greatest difference between the original's logits and those of the bundle imported from `folder`."""
    bundle = import_llava(folder, profile=profile, name="imported")
    model, encoder = bundle.load_model(), bundle.load_vision()
    pixels = encoder._preprocess(picture()).unsqueeze(0)
    features = encoder._features(pixels).float()
    ids = torch.tensor([[5, *[IMAGE_TOKEN_ID] * features.shape[1], 30, 31]])
    with torch.inference_mode():
        expected = original(input_ids=ids.masked_fill(ids == IMAGE_TOKEN_ID, IMAGE_ID), pixel_values=pixels).logits
        found = model.lm(inputs_embeds=model.embed(ids, features)).logits
    return float((expected - found).abs().max())


def test_a_checkpoint_in_shards_is_imported(checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for i in range(2):
        file = f"model-{i}.safetensors"
        save_file({name: state[name] for name in names[i::2]}, folder / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert logits_differ_by(original, folder, profile) < 1e-4


def test_an_lm_is_written_in_shards(checkpoint: Any, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmllm_core.interop.llava._SHARD_BYTES", 50_000)
    original, folder = checkpoint()
    assert logits_differ_by(original, folder, profile) < 1e-4


def test_a_layer_counted_from_the_start_is_the_same_layer(checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint(layer=2)
    assert logits_differ_by(original, folder, profile) < 1e-4


def test_a_projector_without_bias_is_imported(checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint(bias=False)
    assert logits_differ_by(original, folder, profile) < 1e-4


def test_tied_embeddings_are_imported(checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint("llama", tie_word_embeddings=True)
    assert logits_differ_by(original, folder, profile) < 1e-4


def test_the_context_is_no_longer_than_the_lm_allows(checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    assert import_llava(folder, profile=profile, name="imported").profile.language.context_length == 512


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
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=named):
        import_llava(folder, profile=profile, name="refused")


@pytest.mark.parametrize("layer", [0, 4, -5])
def test_a_layer_that_the_tower_lacks_is_refused(layer: int, checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_feature_layer": layer}))
    with pytest.raises(WeightsError, match="vision_feature_layer"):
        import_llava(folder, profile=profile, name="refused")


def test_weights_that_are_no_safetensors_are_refused(checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    (folder / "model.safetensors").write_bytes(b"garbage" * 9)
    with pytest.raises(WeightsError, match="safetensors"):
        import_llava(folder, profile=profile, name="refused")
