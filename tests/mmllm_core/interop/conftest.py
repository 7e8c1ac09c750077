"""Random LLaVA checkpoints of the real classes, in each layout that folders are found in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm_core.config import PathSource, Profile
from mmllm_core.models.profile import load_profile
from tests.conftest import tiny_lm_config

IMAGE_ID = 399
SIZE = 32

MakeCheckpoint = Callable[..., tuple[Any, Path]]


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    """The embedded profile with an LM in full precision, so that nothing but the import can make a difference."""
    embedded = load_profile("embedded")
    language = embedded.language.model_copy(
        update={"source": PathSource(path=tmp_path), "quantization": "none", "dtype": "float32"}
    )
    return embedded.model_copy(update={"language": language})


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Any) -> MakeCheckpoint:
    """Save a random LLaVA with its tokenizer and image processor.

    Gives the model as transformers loads it from that folder in float32, and the folder.
    """

    def build(
        lm: str = "phi3",
        *,
        layer: int = -2,
        strategy: str = "default",
        act: str = "quick_gelu",
        layout: str = "hub",
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        **lm_changes: Any,
    ) -> tuple[Any, Path]:
        from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

        config = LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=SIZE,
                patch_size=8,
                hidden_act=act,
            ),
            text_config=tiny_lm_config(lm, **lm_changes),
            image_token_index=IMAGE_ID,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            multimodal_projector_bias=bias,
            tie_word_embeddings=lm_changes.get("tie_word_embeddings", False),
        )
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases start alike, and a mix-up would not show
                parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path / "llava"
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
        processor.save_pretrained(folder)
        _lay_out(folder / "model.safetensors", layout)
        original, report = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not report["missing_keys"], f"transformers does not read the layout '{layout}'"
        return original.eval(), folder

    return build


def _lay_out(path: Path, layout: str) -> None:
    """Name tensors as checkpoints on the hub do, as transformers saves them now, or as the module tree does."""
    state = load_file(path)
    if layout == "hub":
        state = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in state.items()}
        # Buffers that old versions saved and that are no weights.
        state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
        state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    elif layout == "tree":
        state = {k.replace("language_model.model.", "language_model."): v for k, v in state.items()}
        state = {f"model.{k}".replace("model.language_model.lm_head", "lm_head"): v for k, v in state.items()}
    save_file(state, path, metadata={"format": "pt"})
