"""Bundles that vLLM serves: whatever their LM is made of, the answers are those of the other engine."""

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm_core.bundle import Bundle, BundleInfo, save_bundle
from mmllm_core.config import LoraConfig, PathSource
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IMAGE_TOKEN_ID
from mmllm_core.engine.lora import LoraAdapter
from mmllm_core.engine.protocol import Engine, EngineChunk, EngineRequest, SamplingParams
from mmllm_core.language import add_adapter
from mmllm_core.merging import merge_bundle
from mmllm_core.model import MultimodalLM
from mmllm_core.models.profile import load_profile
from serve_apps.config import PhiConfig
from serve_apps.phi_engine import start_engine, start_shared
from tests.conftest import TinyLM

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM: make test-vllm")

D_VISION, N_PATCHES, D_MODEL = 12, 4, 128
PROMPTS = [
    (
        [20, *[IMAGE_TOKEN_ID] * N_PATCHES, 30, 31],
        torch.randn(1, N_PATCHES, D_VISION, generator=torch.Generator().manual_seed(0)),
    ),
    ([21, 22, 23, 24], None),
]


def adapted_bundle(
    folder: Path, lm: Any, tokenizer: Any, quantization: str, *, name: str = "tiny", rank: int = 8
) -> Bundle:
    """A bundle of a tiny LM, held in float32 or NF4, with an adapter that changes its answers."""
    lm.save_pretrained(folder)
    profile = load_profile("embedded")
    changes = {"source": PathSource(path=folder), "quantization": quantization, "dtype": "float32"}
    profile = profile.model_copy(update={"language": profile.language.model_copy(update=changes)})
    info = BundleInfo(
        name=name, profile=profile, d_vision=D_VISION, n_patches=N_PATCHES, feature_fingerprint="of nothing"
    )
    connector = build_connector(profile.connector, D_VISION, LmShape.of(lm.config), output_std=0.3)
    adapter = add_adapter(lm, LoraConfig(rank=rank))
    for key, weight in adapter.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(weight, std=0.2)
    return save_bundle(info, connector, tokenizer, adapter=adapter)


def phi_config(engine: str, **settings: Any) -> PhiConfig:
    common = {"engine": engine, "kv_cache_bytes": 100_000_000, "ray_actor_options": {"resources": {"text": 1}}}
    return PhiConfig.model_validate(common | settings)


def answers(bundle: Bundle, engine_name: str, merged: bool) -> list[list[int]]:
    """Greedy answers to all prompts at once."""
    model, engine = start_engine(bundle, phi_config(engine_name, merged=merged))
    return said(engine, [(model, None)])


def answers_of_each(bundles: list[Bundle], engine_name: str) -> list[list[int]]:
    """Greedy answers of all bundles to all prompts at once, from one engine."""
    adapters = {bundle.info.name: str(bundle.folder) for bundle in bundles[1:]}
    shared = start_shared(bundles[0], phi_config(engine_name, adapters=adapters))
    return said(shared.engine, [shared.load(bundle) for bundle in bundles])


def said(engine: Engine, voices: list[tuple[MultimodalLM, LoraAdapter | None]]) -> list[list[int]]:
    """The ids of each voice's answer to each prompt; ends the engine."""
    sampling = SamplingParams(max_tokens=24, min_tokens=24)

    async def say(request: EngineRequest) -> list[EngineChunk]:
        return [chunk async for chunk in engine.generate(request)]

    async def all_at_once(requests: list[EngineRequest]) -> list[list[EngineChunk]]:
        return await asyncio.gather(*map(say, requests))

    try:
        with torch.inference_mode():
            requests = [
                EngineRequest(f"{i}-{j}", model.embed(torch.tensor([ids]), features)[0], sampling, adapter=adapter)
                for i, (model, adapter) in enumerate(voices)
                for j, (ids, features) in enumerate(PROMPTS)
            ]
        found = asyncio.run(asyncio.wait_for(all_at_once(requests), 100))
    finally:
        engine.shutdown()
    return [[token for chunk in chunks for token in chunk.token_ids] for chunks in found]


@pytest.mark.parametrize(
    ("quantization", "way"),
    [("nf4", "merged as it starts"), ("none", "adapted as it computes"), ("nf4", "a merged bundle")],
)
def test_vllm_answers_as_the_other_engine(
    quantization: str, way: str, tiny_lm: TinyLM, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm_core.bundle._PACKAGES", ("torch",))  # vLLM's environment lacks most of ours
    lm = tiny_lm("llama", hidden_size=D_MODEL, intermediate_size=256, max_position_embeddings=2048)
    bundle = adapted_bundle(tmp_path / "lm", lm, tokenizer, quantization)
    if way == "a merged bundle":
        bundle = merge_bundle(bundle, "merged")
    merged = way != "adapted as it computes"
    expected = answers(bundle, "transformers", merged)
    assert all(len(set(answer)) > 3 for answer in expected)
    assert answers(bundle, "vllm", merged) == expected


def test_vllm_applies_each_requests_own_adapter(
    tiny_lm: TinyLM, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm_core.bundle._PACKAGES", ("torch",))
    sizes = {"hidden_size": D_MODEL, "intermediate_size": 256, "max_position_embeddings": 2048}
    bundles = [
        adapted_bundle(tmp_path / "lm", tiny_lm("llama", **sizes), tokenizer, "none", name=name, rank=rank)
        for name, rank in (("tiny", 8), ("poet", 4), ("clerk", 6))
    ]
    expected = answers_of_each(bundles, "transformers")
    assert len(set(map(tuple, expected))) == len(bundles) * len(PROMPTS)
    assert answers_of_each(bundles, "vllm") == expected
