"""What a serve config's engine can run, said before anything is loaded."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
from pydantic import ValidationError

from mmllm_core.bundle import Bundle
from mmllm_core.config import CrossAttentionConfig, VllmConfig
from mmllm_core.errors import ConfigError
from serve_apps.config import PhiConfig
from serve_apps.phi_engine import start_engine

ACTOR = {"ray_actor_options": {"resources": {"text": 1}}}
VLLM = PhiConfig.model_validate(ACTOR | {"engine": "vllm"})


def test_vllm_refuses_layers_that_look_at_images(bundle: Bundle) -> None:
    connector = CrossAttentionConfig(kind="cross_attention", n_queries=2, depth=1, head_dim=8, every_k_layers=1)
    profile = bundle.profile.model_copy(update={"connector": connector})
    looking = replace(bundle, info=bundle.info.model_copy(update={"profile": profile}))
    with pytest.raises(ConfigError, match=r"cross_attention.*take transformers"):
        start_engine(looking, VLLM)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_that_vllm_is_missing_is_said(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="not installed"):
        start_engine(bundle, VLLM)


def test_settings_of_another_engine_are_refused() -> None:
    with pytest.raises(ValidationError, match="set engine to vllm"):
        PhiConfig.model_validate(ACTOR | {"vllm": {"tensor_parallel": 2}})
    with pytest.raises(ValidationError, match="tensor_paralel"):
        PhiConfig.model_validate(ACTOR | {"engine": "vllm", "vllm": {"tensor_paralel": 2}})
    assert PhiConfig.model_validate(ACTOR | {"engine": "vllm", "vllm": {"tensor_parallel": 2}}).vllm == VllmConfig(
        tensor_parallel=2
    )
