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
        lm: str = "phi3", *, layer: int = -2, strategy: str = "default", act: str = "quick_gelu", old_keys: bool = True
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
            text_config=tiny_lm_config(lm),
            image_token_index=IMAGE_ID,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
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
