"""A bundle -> the engine that a serve config asks for, and the model that embeds prompts for it.

Does not know prompts, HTTP or Ray.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmllm_core.bundle import Bundle
from mmllm_core.engine.lora import LoraAdapter, adaptable_layers, load_lora, require_plain_lora
from mmllm_core.engine.protocol import Engine, StartEngine
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.engine.vllm_engine import VllmEngine, require_vllm
from mmllm_core.errors import ConfigError
from mmllm_core.extensions import load_extension
from mmllm_core.language import load_embeddings, load_language_model, stop_token_ids
from mmllm_core.merging import merge_adapter
from mmllm_core.model import MultimodalLM
from serve_apps.config import PhiConfig
from serve_apps.servable import require_servable, served_as_stored


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
    require_servable(bundle, config)
    model = bundle.load_model(config.device)
    if config.merged:
        model.lm = _merged(model.lm)
    own = config.engine == "transformers"
    start: StartEngine = (
        partial(TransformersEngine, showing=model.showing) if own else load_extension("mmllm.engines", config.engine)
    )
    engine = start(
        model.lm,
        bundle.tokenizer,
        context_length=bundle.profile.language.context_length,
        kv_cache_bytes=config.kv_cache_bytes,
        max_sequences=config.max_ongoing_requests,
        step_tokens=config.step_tokens,
        n_threads=config.n_threads,
    )
    return model, engine


@dataclass(frozen=True)
class SharedBase:
    """An LM that takes adapters, and its engine: what bundles of one base share."""

    lm: Any
    engine: Engine
    layers: dict[str, tuple[int, int]]
    device: str
    max_rank: int | None = None
    """Of an adapter that the engine takes; None for any."""

    def load(self, bundle: Bundle) -> tuple[MultimodalLM, LoraAdapter | None]:
        """A bundle's model, for embedding prompts alone, and its adapter, if it has one.

        Raises:
            ConfigError: the adapter cannot be applied beside others.
        """
        model = MultimodalLM(self.lm, bundle.load_connector(self.lm.config).to(self.device)).eval()
        adapter = None
        if bundle.adapter:
            dtype = self.lm.get_input_embeddings().weight.dtype
            adapter = load_lora(bundle.adapter, bundle.info.name, self.layers, dtype=dtype, device=self.device)
            if self.max_rank is not None and adapter.rank > self.max_rank:
                raise ConfigError(
                    f"adapter '{bundle.info.name}': its rank {adapter.rank} is above {self.max_rank}, which vLLM was "
                    "started for: deploy anew"
                )
        return model.requires_grad_(False), adapter


def start_shared(bundle: Bundle, config: PhiConfig) -> SharedBase:
    """Load the LM of a bundle without its adapter, and start an engine in which each request may have one.

    Raises:
        ConfigError: the engine is not there, or cannot apply adapters to such an LM.
        EngineError: the engine did not start.
    """
    language = bundle.profile.language
    lm: Any = load_language_model(language, bundle.weights(language.source), config.device)
    layers = adaptable_layers(lm)
    if config.engine == "vllm":
        del lm
        folders = [bundle.adapter, *(Bundle.open(folder).adapter for folder in config.adapters.values())]
        ranks = [require_plain_lora(folder, folder.parent.name).r for folder in folders if folder]
        model, engine = _vllm(bundle, config.model_copy(update={"merged": False}), max(ranks, default=8))
        return SharedBase(model.lm, engine, layers, config.device, max(ranks, default=8))
    if config.merged:
        lm = _merged(lm)
    engine = TransformersEngine(
        lm,
        bundle.tokenizer,
        context_length=language.context_length,
        kv_cache_bytes=config.kv_cache_bytes,
        max_sequences=config.max_ongoing_requests,
        step_tokens=config.step_tokens,
        takes_adapters=True,
        n_threads=config.n_threads,
    )
    return SharedBase(lm, engine, layers, config.device)


def _vllm(bundle: Bundle, config: PhiConfig, lora_rank: int | None = None) -> tuple[MultimodalLM, Engine]:
    """vLLM reads the LM from a folder; here its embeddings and the connector are kept.

    Args:
        lora_rank: of the largest adapter that requests may have; None if they have none.
    """
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
            adapter=None if config.merged or lora_rank else bundle.adapter,
            lora_rank=lora_rank,
            max_adapters=config.adapters_in_memory,
            kv_cache_bytes=config.kv_cache_bytes,
            max_sequences=config.max_ongoing_requests,
            step_tokens=config.step_tokens,
        )
    return model, engine


def _lm_for_vllm(bundle: Bundle, config: PhiConfig, scratch: Path) -> Path:
    """Folder of the LM as vLLM is to load it: as it is, or else plain and merged in `scratch`."""
    language = bundle.profile.language
    stored = bundle.weights(language.source)
    if served_as_stored(bundle, config):
        return stored
    lm: Any = bundle.load_model().lm if config.merged else load_language_model(language, stored)
    _merged(lm).save_pretrained(scratch)
    return scratch


def _merged(lm: Any) -> Any:
    dtype: torch.dtype = lm.get_input_embeddings().weight.dtype
    return merge_adapter(lm, dtype)
