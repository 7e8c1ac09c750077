"""What a serve config's engine can run, said before anything is loaded."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
from pydantic import ValidationError

from mmllm_core.bundle import Bundle, save_bundle
from mmllm_core.config import CrossAttentionConfig, VllmConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.errors import ConfigError
from serve_apps.builder import build
from serve_apps.config import PhiConfig
from serve_apps.config_files import load_serve_config
from serve_apps.phi_engine import start_engine

ACTOR = {"ray_actor_options": {"resources": {"text": 1}}}
VLLM = PhiConfig.model_validate(ACTOR | {"engine": "vllm"})


def test_vllm_refuses_layers_that_look_at_images(bundle: Bundle) -> None:
    connector = CrossAttentionConfig(kind="cross_attention", n_queries=2, depth=1, head_dim=8, every_k_layers=1)
    profile = bundle.profile.model_copy(update={"connector": connector})
    info = bundle.info.model_copy(update={"profile": profile, "name": "looking"})
    looking = save_bundle(info, build_connector(connector, info.d_vision, LmShape(64, 2)), bundle.tokenizer)
    with pytest.raises(ConfigError, match=r"cross_attention.*take transformers"):
        start_engine(looking, VLLM)
    with pytest.raises(ConfigError, match="cross_attention"):  # before any replica starts
        build(load_serve_config("embedded", {"phi.engine": "vllm"}), looking.folder)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_that_vllm_is_missing_is_said(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="not installed"):
        start_engine(bundle, VLLM)


def test_settings_of_another_engine_are_refused() -> None:
    with pytest.raises(ValidationError, match="set engine to vllm"):
        PhiConfig.model_validate(ACTOR | {"vllm": {"tensor_parallel": 2}})
    with pytest.raises(ValidationError, match="tensor_paralel"):
        PhiConfig.model_validate(ACTOR | {"engine": "vllm", "vllm": {"tensor_paralel": 2}})
    gpus = {"ray_actor_options": {"num_gpus": 2, "resources": {"text": 1}}, "device": "cuda"}
    found = PhiConfig.model_validate(gpus | {"engine": "vllm", "vllm": {"tensor_parallel": 2}})
    assert found.vllm == VllmConfig(tensor_parallel=2)


@pytest.mark.parametrize(
    ("num_gpus", "vllm", "reason"),
    [
        (0, {"quantization": "nf4"}, "nf4 needs a GPU"),
        (0, {"quantization": "fp8"}, "fp8 needs a GPU"),
        (0, {"tensor_parallel": 2}, "the device is cpu"),
        (1, {"tensor_parallel": 2}, "above ray_actor_options.num_gpus 1"),
        (0.8, {}, "gpu_memory_utilization 0.9 is above ray_actor_options.num_gpus 0.8"),
    ],
)
def test_what_vllm_cannot_have_is_refused_with_the_config(num_gpus: float, vllm: dict[str, Any], reason: str) -> None:
    actor = {"ray_actor_options": {"num_gpus": num_gpus, "resources": {"text": 1}}}
    with pytest.raises(ValidationError, match=reason):
        PhiConfig.model_validate(actor | {"device": "cuda" if num_gpus else "cpu", "engine": "vllm", "vllm": vllm})


def test_a_merged_lm_is_no_awq(bundle: Bundle) -> None:
    gpu = {"ray_actor_options": {"num_gpus": 1, "resources": {"text": 1}}, "device": "cuda"}
    config = PhiConfig.model_validate(gpu | {"engine": "vllm", "vllm": {"quantization": "awq"}})
    language = bundle.profile.language.model_copy(update={"quantization": "nf4"})
    profile = bundle.profile.model_copy(update={"language": language})
    with pytest.raises(ConfigError, match="awq is for an LM that was quantized so beforehand"):
        start_engine(replace(bundle, info=bundle.info.model_copy(update={"profile": profile})), config)
