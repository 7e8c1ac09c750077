"""A bundle -> the engine that a serve config asks for, and the model that embeds prompts for it.

Does not know prompts, HTTP or Ray.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from mmllm_core.bundle import Bundle
from mmllm_core.engine.protocol import Engine
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.engine.vllm_engine import VllmEngine, require_vllm
from mmllm_core.errors import ConfigError
from mmllm_core.language import load_embeddings, load_language_model, stop_token_ids
from mmllm_core.merging import merge_adapter
from mmllm_core.model import MultimodalLM
from serve_apps.config import PhiConfig


def require_servable(bundle: Bundle, config: PhiConfig) -> None:
    """Refuse a bundle that the config's engine cannot run, before anything is loaded.

    Raises:
        ConfigError: what it is that the engine cannot do, and what to do instead.
    """
    if config.engine != "vllm":
        return
    if bundle.profile.connector.kind == "cross_attention":
        raise ConfigError(
            f"phi.engine: vllm, and the layers of bundle '{bundle.info.name}' look at images themselves "
            "(cross_attention), which vLLM's cannot: take transformers"
        )
    if config.vllm.quantization == "awq" and not _served_as_stored(bundle, config):
        raise ConfigError(
            f"vllm.quantization: awq is for an LM that was quantized so beforehand, and that of bundle "
            f"'{bundle.info.name}' is dequantized or merged first: leave it out, or take fp8 or nf4"
        )


def start_engine(bundle: Bundle, config: PhiConfig) -> tuple[MultimodalLM, Engine]:
    """Load a bundle's model and start its engine.

    Returns:
        The model, for embedding prompts alone, and the engine.

    Raises:
        ConfigError: the engine is not there, or cannot run such a bundle.
        ExportError: the adapter cannot be merged, as `config.merged` asks.
        EngineError: the engine did not start.
    """
    if config.engine == "vllm":
        return _vllm(bundle, config)
    model = bundle.load_model(config.device)
    if config.merged:
        model.lm = _merged(model.lm)
    engine = TransformersEngine(
        model.lm,
        bundle.tokenizer,
        context_length=bundle.profile.language.context_length,
        showing=model.showing,
        kv_cache_bytes=config.kv_cache_bytes,
        max_sequences=config.max_ongoing_requests,
        step_tokens=config.step_tokens,
        n_threads=config.n_threads,
    )
    return model, engine


def _vllm(bundle: Bundle, config: PhiConfig) -> tuple[MultimodalLM, Engine]:
    """vLLM reads the LM from a folder; here its embeddings and the connector are kept."""
    require_servable(bundle, config)
    require_vllm(config.vllm, config.device)
    language, tokenizer = bundle.profile.language, bundle.tokenizer
    with tempfile.TemporaryDirectory(prefix="mmllm-lm-") as scratch:
        folder = _lm_for_vllm(bundle, config, Path(scratch))
        lm: Any = load_embeddings(language, folder, config.device)
        model = MultimodalLM(lm, bundle.load_connector(lm.config).to(config.device)).eval().requires_grad_(False)
        engine = VllmEngine(
            folder,
            tokenizer,
            embed=lm.get_input_embeddings(),
            stop_ids=stop_token_ids(lm, tokenizer),
            context_length=language.context_length,
            dtype=lm.get_input_embeddings().weight.dtype,
            config=config.vllm,
            device=config.device,
            adapter=None if config.merged else bundle.adapter,
            kv_cache_bytes=config.kv_cache_bytes,
            max_sequences=config.max_ongoing_requests,
            step_tokens=config.step_tokens,
        )
    return model, engine


def _served_as_stored(bundle: Bundle, config: PhiConfig) -> bool:
    """Whether vLLM can load the LM as it lies there, neither dequantized nor merged."""
    return bundle.profile.language.quantization == "none" and (bundle.adapter is None or not config.merged)


def _lm_for_vllm(bundle: Bundle, config: PhiConfig, scratch: Path) -> Path:
    """Folder of the LM as vLLM is to load it: as it is, or else plain and merged in `scratch`."""
    language = bundle.profile.language
    stored = bundle.weights(language.source)
    if _served_as_stored(bundle, config):
        return stored
    lm: Any = bundle.load_model().lm if config.merged else load_language_model(language, stored)
    _merged(lm).save_pretrained(scratch)
    return scratch


def _merged(lm: Any) -> Any:
    dtype: torch.dtype = lm.get_input_embeddings().weight.dtype
    return merge_adapter(lm, dtype)
