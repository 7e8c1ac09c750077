"""Projections that turn each feature into one embedding.

In: features (b, n, d_vision). Out: embeddings (b, n, d_model), n LM positions an image.
"""

from torch import Tensor, nn

from mmllm_core.config import LinearConfig, MlpConfig
from mmllm_core.connectors.base import Connector, LmShape


class LinearConnector(Connector):
    """One linear layer, as in the first LLaVA (Liu et al., 2023, arXiv:2304.08485)."""

    def __init__(self, config: LinearConfig, d_vision: int, lm: LmShape):
        super().__init__(config, d_vision, lm.d_model)
        self.norm = nn.LayerNorm(d_vision) if config.input_norm else nn.Identity()
        self.linear = nn.Linear(d_vision, lm.d_model, bias=config.bias)

    @property
    def last_layer(self) -> nn.Linear:
        """The only layer."""
        return self.linear

    def forward(self, features: Tensor) -> Tensor:
        """Project features (b, n, d_vision) to embeddings (b, n, d_model)."""
        embeddings: Tensor = self.linear(self.norm(features.to(self.dtype)))
        return embeddings


class MlpConnector(Connector):
    """Two linear layers with GELU between: `mlp2x_gelu` of LLaVA-1.5 (Liu et al., 2023, arXiv:2310.03744)."""

    def __init__(self, config: MlpConfig, d_vision: int, lm: LmShape):
        super().__init__(config, d_vision, lm.d_model)
        self.norm = nn.LayerNorm(d_vision) if config.input_norm else nn.Identity()
        self.linear_1 = nn.Linear(d_vision, lm.d_model, bias=config.bias)
        self.linear_2 = nn.Linear(lm.d_model, lm.d_model, bias=config.bias)

    @property
    def last_layer(self) -> nn.Linear:
        """The second layer."""
        return self.linear_2

    def forward(self, features: Tensor) -> Tensor:
        """Project features (b, n, d_vision) to embeddings (b, n, d_model)."""
        hidden = nn.functional.gelu(self.linear_1(self.norm(features.to(self.dtype))))  # (b, n, d_model)
        embeddings: Tensor = self.linear_2(hidden)
        return embeddings
