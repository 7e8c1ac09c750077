"""Random LLaVA checkpoints of the real classes, in each layout that folders are found in, and bundles to export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm_core.bundle import Bundle, BundleInfo, save_bundle
from mmllm_core.config import ConnectorConfig, LanguageConfig, LoraConfig, MlpConfig, PathSource, Profile, VisionConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.language import add_adapter, load_language_model
from mmllm_core.models.profile import load_profile
from mmllm_core.vision import ClipEncoder
from tests.conftest import MakeTokenizer, TinyLM, tiny_lm_config

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


@pytest.fixture
def make_bundle(
    tiny_lm: TinyLM, tiny_clip: Callable[..., Path], make_tokenizer: MakeTokenizer, tmp_path: Path
) -> Callable[..., Bundle]:
    """Save a bundle as a training run leaves it: own CLIP, connector, adapter, and a reference to the LM."""

    def build(
        lm: str = "phi3",
        *,
        template: str = "phi3",
        layer: int = -2,
        cls_token: bool = False,
        merge: int = 1,
        quantization: str = "none",
        dtype: str = "float32",
        connector: ConnectorConfig = MlpConfig(),
        adapter: bool = True,
        name: str = "trained",
        **lm_changes: Any,
    ) -> Bundle:
        folder = tmp_path / f"{name}-lm"
        tokenizer = make_tokenizer(template)
        tiny_lm(lm, **lm_changes).save_pretrained(folder)
        clip = tiny_clip(quick_gelu=True)
        vision = VisionConfig(source=PathSource(path=clip), feature_layer=layer, cls_token=cls_token, merge=merge)
        encoder = ClipEncoder(vision, clip)
        language = LanguageConfig(source=PathSource(path=folder), quantization=quantization, dtype=dtype)  # type: ignore[arg-type]
        embedded = load_profile("embedded")
        torch.manual_seed(2)
        bridge = build_connector(connector, encoder.d_vision, LmShape(64, 2), output_std=1.0)
        adapted = add_adapter(load_language_model(language, folder), LoraConfig(rank=4)) if adapter else None
        if adapted is not None:
            with torch.no_grad():
                for parameter_name, parameter in adapted.named_parameters():
                    if "lora_B" in parameter_name:
                        parameter.normal_(std=0.1)
        return save_bundle(
            BundleInfo(
                name=name,
                profile=embedded.model_copy(
                    update={
                        "vision": vision.model_copy(update={"origin": embedded.vision.origin}),
                        "language": language.model_copy(update={"origin": embedded.language.origin}),
                        "connector": connector,
                    }
                ),
                d_vision=encoder.d_vision,
                n_patches=encoder.n_patches,
                feature_fingerprint=encoder.fingerprint,
                recipe={"name": "tiny-instruct", "stage": "instruct", "steps": 3, "seed": 0},
                data={"easy-vqa": "f" * 64},
                metrics={
                    "loss": 0.5,
                    "seconds": 9.5,
                    "accuracy": {"before": {"all": [0, 4]}, "after": {"all": [3, 4], "shape": [1, 2]}},
                },
            ),
            bridge,
            tokenizer,
            adapter=adapted,
            vision_weights=clip,
        )

    return build
