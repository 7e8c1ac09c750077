"""Which bundles a serve config's engine can run, said before anything is loaded, and without PyTorch where that can be.

Does not know Ray or HTTP.
"""

from mmllm_core.bundle import Bundle
from mmllm_core.errors import ConfigError
from serve_apps.config import PhiConfig


def require_servable(bundle: Bundle, config: PhiConfig) -> None:
    """Refuse a bundle that the config's engine cannot run, before anything is loaded.

    Raises:
        ConfigError: what it is that the engine cannot do, and what to do instead.
    """
    if config.adapters:
        if bundle.profile.connector.kind == "cross_attention":
            raise ConfigError(
                f"phi.adapters: the layers of bundle '{bundle.info.name}' look at images themselves (cross_attention), "
                "and bundles that share an LM cannot: serve it by itself"
            )
        if bundle.adapter:
            from mmllm_core.engine.lora import require_plain_lora

            require_plain_lora(bundle.adapter, bundle.info.name)
    if config.engine == "transformers":
        return
    if bundle.profile.connector.kind == "cross_attention":
        raise ConfigError(
            f"phi.engine: {config.engine}, and the layers of bundle '{bundle.info.name}' look at images themselves "
            "(cross_attention), which they can by one engine alone: take transformers"
        )
    if config.vllm.quantization == "awq" and not served_as_stored(bundle, config):
        raise ConfigError(
            f"vllm.quantization: awq is for an LM that was quantized so beforehand, and that of bundle "
            f"'{bundle.info.name}' is dequantized or merged first: leave it out, or take fp8 or nf4"
        )


def require_reloadable(config: PhiConfig) -> None:
    """Refuse to load another bundle beside the one that answers where there cannot be room for both.

    Raises:
        ConfigError: what to do instead.
    """
    alone = config.engine == "vllm" and config.device == "cuda" and not config.adapters
    if alone and config.vllm.gpu_memory_utilization > 0.5:
        raise ConfigError(
            f"vllm.gpu_memory_utilization: {config.vllm.gpu_memory_utilization:g} leaves no room for another LM beside "
            "the one that answers: deploy anew, or serve bundles by phi.adapters, which share one"
        )


def served_as_stored(bundle: Bundle, config: PhiConfig) -> bool:
    """Whether vLLM can load the LM as it lies there, neither dequantized nor merged."""
    return bundle.profile.language.quantization == "none" and (bundle.adapter is None or not config.merged)
