"""CLIP's text tower: what open_clip gives, and what it is not asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmllm_core.config import PathSource, VisionConfig
from mmllm_core.errors import BadInput, WeightsError
from mmllm_core.text_tower import ClipTextEncoder, has_text_tower
from mmllm_core.vision import CLIP_CONFIG, CLIP_WEIGHTS, ClipEncoder
from mmllm_core.vision_tower import save_vision

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
TEXTS = ["a red circle", "A blue   square!", "¿qué?"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random CLIP with both towers, and the folder that it is saved in."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.model.CLIP(**ARCHITECTURE).eval()
    folder = tmp_path_factory.mktemp("whole-clip")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / CLIP_WEIGHTS)
    (folder / CLIP_CONFIG).write_text(json.dumps({"model_cfg": ARCHITECTURE, "preprocess_cfg": {}}))
    return model, folder


def test_both_towers_give_what_open_clip_gives(whole: tuple[Any, Path]) -> None:
    import open_clip

    model, folder = whole
    texts, images = ClipTextEncoder(folder), ClipEncoder(VisionConfig(source=PathSource(path=folder)), folder)
    pixels = images.preprocess([Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")])
    found = texts.embed([texts.tokens(text) for text in TEXTS])
    tokens = open_clip.SimpleTokenizer(context_length=12)(TEXTS)
    with torch.inference_mode():
        wanted = model.encode_text(tokens, normalize=True).numpy()
        seen = model.encode_image(pixels, normalize=True).numpy()
    assert (found.shape, found.dtype) == ((3, 16), np.float32)
    assert np.allclose(found, wanted, atol=1e-5)
    assert np.allclose(images.embed_pixels(pixels), seen, atol=1e-5)


def test_keys_of_newer_checkpoints_are_found_too(whole: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = whole
    state = load_file(folder / CLIP_WEIGHTS)
    renamed = {k if k.startswith(("visual.", "logit")) else f"text.{k}": v for k, v in state.items()}
    save_file(renamed, tmp_path / CLIP_WEIGHTS)
    (tmp_path / CLIP_CONFIG).write_text((folder / CLIP_CONFIG).read_text())
    assert has_text_tower(tmp_path)
    one, other = ClipTextEncoder(folder), ClipTextEncoder(tmp_path)
    assert np.array_equal(one.embed([one.tokens("red")]), other.embed([other.tokens("red")]))


@pytest.mark.parametrize("text", ["", "  \n", "word " * 11, "x" * 100_000, "漢" * 40, "&nbsp;"])
def test_what_says_nothing_or_too_much_is_refused_and_never_cut(whole: tuple[Any, Path], text: str) -> None:
    encoder = ClipTextEncoder(whole[1])
    with pytest.raises(BadInput) as caught:
        encoder.tokens(text, "input.3")
    assert caught.value.param == "input.3"
    assert len(encoder.tokens("word " * 10)) == 12


def test_words_that_anybody_sends_are_not_remembered_for_ever(
    whole: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm_core.text_tower._REMEMBERED_WORDS", 20)
    encoder = ClipTextEncoder(whole[1])
    first = encoder.tokens("aword")
    for i in range(100):
        encoder.tokens(f"q{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10]}z")
        assert len(encoder._tokenizer.cache) <= 21
    assert encoder.tokens("aword") == first


def test_a_vision_tower_alone_has_no_texts(tiny_clip: Callable[..., Path]) -> None:
    assert not has_text_tower(tiny_clip())


def test_texts_do_not_belong_to_a_tower_that_was_trained_on(whole: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = whole
    assert has_text_tower(folder)
    save_vision(ClipEncoder(VisionConfig(source=PathSource(path=folder)), folder).tower, folder, tmp_path)
    assert not has_text_tower(tmp_path)


def test_another_tokenizers_tower_is_one_named_error(whole: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = whole
    text_cfg = ARCHITECTURE["text_cfg"] | {"vocab_size": 100}
    (tmp_path / CLIP_CONFIG).write_text(json.dumps({"model_cfg": ARCHITECTURE | {"text_cfg": text_cfg}}))
    (tmp_path / CLIP_WEIGHTS).write_bytes((folder / CLIP_WEIGHTS).read_bytes())
    with pytest.raises(WeightsError, match="vocabulary"):
        ClipTextEncoder(tmp_path)
