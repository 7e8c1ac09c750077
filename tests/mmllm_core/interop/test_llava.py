"""LLaVA import: the bundle's logits are the original's, on tiny random models of the real classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm_core.bundle import Bundle
from mmllm_core.config import Profile
from mmllm_core.conversation import IMAGE_TOKEN_ID
from mmllm_core.interop.llava import import_llava
from mmllm_core.language import stop_token_ids

IMAGE_ID = 399
"""The image token of the checkpoints that `conftest.py` saves."""


def picture(width: int = 40, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def prompt(n_features: int) -> Tensor:
    return torch.tensor([[5, 20, *[IMAGE_TOKEN_ID] * n_features, 30, 31, 32]])


@torch.inference_mode()
def logits_of_both(original: Any, bundle: Bundle) -> tuple[Tensor, Tensor]:
    """The original's logits and the bundle's, for the same pixels and tokens."""
    model, encoder = bundle.load_model(), bundle.load_vision()
    pixels = encoder.preprocess([picture()])
    features = encoder.tower(pixels)  # as `encode` computes them, before they are stored in half precision
    ids = prompt(features.shape[1])
    expected = original(input_ids=ids.masked_fill(ids == IMAGE_TOKEN_ID, IMAGE_ID), pixel_values=pixels).logits
    return expected, model.lm(inputs_embeds=model.embed(ids, features)).logits


def assert_imported_alike(original: Any, folder: Path, profile: Profile) -> None:
    expected, found = logits_of_both(original, import_llava(folder, profile=profile, name="imported"))
    assert (expected - found).abs().max() < 1e-4


@pytest.mark.parametrize("lm", ["phi3", "llama"])
@pytest.mark.parametrize("layer", [-2, -1])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_logits_equal_the_originals(lm: str, layer: int, strategy: str, checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint(lm, layer=layer, strategy=strategy)
    assert_imported_alike(original, folder, profile)


@pytest.mark.parametrize("lm", ["phi3", "llama"])
@pytest.mark.parametrize("layout", ["hub", "saved", "tree"])
def test_every_layout_of_tensor_names_is_read(lm: str, layout: str, checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint(lm, layout=layout)
    assert_imported_alike(original, folder, profile)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_the_towers_activation_is_kept(act: str, checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint(act=act)
    assert_imported_alike(original, folder, profile)


@pytest.mark.parametrize("lm", ["phi3", "llama"])
def test_greedy_answers_to_an_image_equal_the_originals(lm: str, checkpoint: Any, profile: Profile) -> None:
    from transformers import CLIPImageProcessor

    original, folder = checkpoint(lm)
    bundle = import_llava(folder, profile=profile, name="imported")
    image = picture(32, 32)  # needs no resampling, in which libraries differ
    features = torch.from_numpy(bundle.load_vision().encode([image]))
    ids = prompt(features.shape[1])
    new = bundle.load_model().generate(ids, torch.ones_like(ids), features, max_new_tokens=8, stop_ids=[0])

    reference = original.generate(
        input_ids=ids.masked_fill(ids == IMAGE_TOKEN_ID, IMAGE_ID),
        pixel_values=CLIPImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values,
        max_new_tokens=8,
        do_sample=False,
    )
    assert bundle.tokenizer.decode(new[0]) == bundle.tokenizer.decode(reference[0, ids.shape[1] :])


def test_pixels_equal_those_of_the_checkpoints_processor(checkpoint: Any, profile: Profile) -> None:
    from transformers import CLIPImageProcessor

    _, folder = checkpoint()
    processor = CLIPImageProcessor.from_pretrained(folder, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    processor.save_pretrained(folder)
    preprocess = import_llava(folder, profile=profile, name="imported").load_vision().preprocess

    def differ(image: Image.Image) -> float:
        return float((processor(image, return_tensors="pt").pixel_values[0] - preprocess([image])[0]).abs().max())

    assert differ(picture(32, 32)) < 1e-5
    assert differ(picture(40, 48)) < 0.03, "resized and cropped alike, up to rounding to 8 bits"


def test_a_checkpoint_in_shards_is_read(checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert_imported_alike(original, folder, profile)


def test_an_lm_larger_than_a_shard_is_written_in_several(
    checkpoint: Any, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm_core.interop.shards.SHARD_BYTES", 50_000)
    original, folder = checkpoint()
    bundle = import_llava(folder, profile=profile, name="imported")
    expected, found = logits_of_both(original, bundle)

    assert len(list((bundle.folder / "language").glob("*.safetensors"))) > 1
    assert (expected - found).abs().max() < 1e-4


def test_a_layer_counted_from_the_start_is_the_same_layer(checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint(layer=2)
    assert_imported_alike(original, folder, profile)


def test_a_projector_without_bias_is_read(checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint(bias=False)
    assert_imported_alike(original, folder, profile)


@pytest.mark.parametrize("said", ["on top", "inside"])
def test_tied_embeddings_stay_tied(said: str, checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint("llama", tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = said == "on top"
    config["text_config"]["tie_word_embeddings"] = said == "inside"
    (folder / "config.json").write_text(json.dumps(config))

    assert_imported_alike(original, folder, profile)


def test_half_precision_stays_half_on_disk(checkpoint: Any, profile: Profile) -> None:
    original, folder = checkpoint(dtype=torch.float16)
    bundle = import_llava(folder, profile=profile, name="imported")
    expected, found = logits_of_both(original, bundle)

    assert json.loads((bundle.folder / "language" / "config.json").read_text())["dtype"] == "float16"
    assert load_file(bundle.folder / "language" / "model-00001.safetensors")["lm_head.weight"].dtype == torch.float16
    assert (expected - found).abs().max() < 1e-4


def test_what_ends_an_answer_is_carried_over(checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 77]}))
    bundle = import_llava(folder, profile=profile, name="imported")

    assert 77 in stop_token_ids(bundle.load_model().lm, bundle.tokenizer)


def test_the_profile_says_how_the_lm_is_loaded(checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    language = profile.language.model_copy(update={"quantization": "nf4", "dtype": "bfloat16"})
    bundle = import_llava(folder, profile=profile.model_copy(update={"language": language}), name="imported")

    assert any(isinstance(module, Linear4bit) for module in bundle.load_model().lm.modules())
    assert bundle.profile.audio == profile.audio


def test_the_context_is_no_longer_than_the_lm_allows(checkpoint: Any, profile: Profile) -> None:
    _, folder = checkpoint()
    assert import_llava(folder, profile=profile, name="imported").profile.language.context_length == 512
