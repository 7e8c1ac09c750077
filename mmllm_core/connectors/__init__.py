"""Features -> LM embeddings: the trained bridges between CLIP and the LM, each chosen by its config's `kind`.

`linear`, `mlp` and `resampler` give embeddings that are spliced into the prompt; `cross_attention` leaves the prompt to
text and lets the LM's layers look at the images. A connector does not know images, tokens or files.
"""

from pkgutil import resolve_name

from mmllm_core.config import ConnectorConfig
from mmllm_core.connectors.base import Connector, LmShape
from mmllm_core.connectors.cross_attention import CrossAttentionConnector, Media
from mmllm_core.connectors.projection import LinearConnector, MlpConnector
from mmllm_core.connectors.resampler import PerceiverResampler, ResamplerConnector
from mmllm_core.errors import ConfigError

__all__ = [
    "Connector",
    "CrossAttentionConnector",
    "LinearConnector",
    "LmShape",
    "Media",
    "MlpConnector",
    "PerceiverResampler",
    "ResamplerConnector",
    "build_connector",
]


def build_connector(config: ConnectorConfig, d_vision: int, lm: LmShape, output_std: float | None = None) -> Connector:
    """The connector that a config names, freshly initialised.

    Args:
        d_vision: width of a feature.
        lm: the LM that it leads to.
        output_std: root mean square that embeddings start with; None keeps torch's default initialisation.
            Small LMs have small embeddings, and a connector that starts at their scale learns sooner.

    Raises:
        ConfigError: the LM has too few layers for the config, or what the config builds is not there.
    """
    try:
        build = resolve_name(config.builds)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"connector {config.kind}: {config.builds} cannot be imported: {error}") from error
    connector: Connector = build(config, d_vision, lm)
    if output_std is not None:
        connector.scale_output(output_std)
    return connector
