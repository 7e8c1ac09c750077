"""The trained bridges between CLIP and the LM, as configs: which there are is known by their `kind`.

A kind is a subclass of `BaseConnectorConfig`: one class says what it is called, what it may be set to, and which module
it builds. Those of other packages are declared as entry points (`mmllm_core.extensions`). Does not know torch.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from mmllm_core.config.reading import StrictModel
from mmllm_core.errors import ConfigError
from mmllm_core.extensions import extension_names, load_extension


class BaseConnectorConfig(StrictModel):
    """What every connector's config says."""

    builds: ClassVar[str]
    """The connector's class, as `package.module:Class`; it takes this config, `d_vision` and an `LmShape`."""

    kind: str

    def n_tokens(self, n_features: int) -> int:
        """LM positions that an image of `n_features` features takes."""
        raise NotImplementedError


class _ProjectionConfig(BaseConnectorConfig):
    input_norm: bool = False
    """Layer norm over each feature before the first layer; LLaVA has none."""
    bias: bool = True

    def n_tokens(self, n_features: int) -> int:
        """LM positions that an image of `n_features` features takes: one a feature."""
        return n_features


class LinearConfig(_ProjectionConfig):
    """One linear layer from features to LM embeddings."""

    builds = "mmllm_core.connectors.projection:LinearConnector"
    kind: Literal["linear"] = "linear"


class MlpConfig(_ProjectionConfig):
    """Two linear layers with GELU between: LLaVA-1.5's `mlp2x_gelu`."""

    builds = "mmllm_core.connectors.projection:MlpConnector"
    kind: Literal["mlp"] = "mlp"


class QueriesConfig(BaseConnectorConfig):
    """Learned queries that read an image's features, however many those are."""

    n_queries: int = Field(default=64, gt=0)
    depth: int = Field(default=2, gt=0)
    """Blocks in which they read."""
    head_dim: int = Field(default=64, gt=0)


class ResamplerConfig(QueriesConfig):
    """A Perceiver resampler, whose queries are spliced into the prompt."""

    builds = "mmllm_core.connectors.resampler:ResamplerConnector"
    kind: Literal["resampler"] = "resampler"

    def n_tokens(self, n_features: int) -> int:
        """LM positions that an image takes: one a query."""
        return self.n_queries


class CrossAttentionConfig(QueriesConfig):
    """Gated cross-attention blocks before every k-th LM layer, which attend to resampled features."""

    builds = "mmllm_core.connectors.cross_attention:CrossAttentionConnector"
    kind: Literal["cross_attention"] = "cross_attention"
    every_k_layers: int = Field(default=4, gt=0)
    gate_rate: float = Field(default=1.0, gt=0)
    """What gates are multiplied with before Flamingo's tanh. Adam moves every parameter by about the learning rate a
    step, and a gate has further to go than weights have: at 1 it stays all but shut as long as a short run lasts."""

    def n_tokens(self, n_features: int) -> int:
        """LM positions that an image takes: one, which marks where it was put."""
        return 1


_OWN: dict[str, type[BaseConnectorConfig]] = {
    str(config.model_fields["kind"].default): config
    for config in (LinearConfig, MlpConfig, ResamplerConfig, CrossAttentionConfig)
}


def connector_kinds() -> list[str]:
    """Kinds that a profile or a recipe may name, those of installed packages included."""
    return sorted({*_OWN, *extension_names("mmllm.connectors")})


def _of_its_kind(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind = value.get("kind")
    if kind not in connector_kinds():
        said = "kind is missing" if kind is None else f"kind {kind!r} is unknown"
        raise ValueError(f"{said}: choose one of {', '.join(connector_kinds())}")
    try:
        config = _OWN.get(kind) or load_extension("mmllm.connectors", kind)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return config.model_validate(value)


ConnectorConfig = Annotated[SerializeAsAny[BaseConnectorConfig], BeforeValidator(_of_its_kind)]
"""The trained bridge from features to LM embeddings, of any kind."""
