"""Bundles as training makes them, of the base of the tests' own: with adapters that change answers."""

from typing import Any

import torch

from mmllm_core.bundle import Bundle, save_bundle
from mmllm_core.config import LoraConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.language import add_adapter, load_language_model


def adapted(bundle: Bundle, name: str, seed: int, rank: int = 4, **changes: Any) -> Bundle:
    """A bundle of the same base, with a connector and an adapter of its own."""
    lm = load_language_model(bundle.profile.language, bundle.weights(bundle.profile.language.source))
    torch.manual_seed(seed)
    adapter = add_adapter(lm, LoraConfig(rank=rank, **changes))
    for key, weight in adapter.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(weight, std=0.2)
    shape = LmShape.of(lm.config)
    connector = build_connector(bundle.profile.connector, bundle.info.d_vision, shape, output_std=0.2)
    vision = bundle.weights(bundle.profile.vision.source)
    info = bundle.info.model_copy(update={"name": name})
    return save_bundle(info, connector, bundle.tokenizer, adapter=adapter, vision_weights=vision, make_latest=False)
