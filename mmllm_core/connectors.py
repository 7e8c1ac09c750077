"""Features -> LM embeddings: the trained bridge between CLIP and the LM.

In: features (b, n, d_vision). Out: embeddings (b, m, d_model), m being `n_tokens(n)`. Does not know images,
tokens or the LM beyond its width.
"""

import torch
from torch import Tensor, nn

from mmllm_core.config import ConnectorConfig


class MlpConnector(nn.Module):
    """Two linear layers with GELU between: `mlp2x_gelu` of LLaVA-1.5 (Liu et al., 2023, arXiv:2310.03744).

    Args:
        config: whether features are normalised first and whether the layers have a bias.
        d_vision: width of a feature.
        d_model: width of an LM embedding.
        output_std: root mean square that outputs start with; None keeps torch's default initialisation.
            Small LMs have small embeddings, and a connector that starts at their scale learns sooner.
    """

    def __init__(self, config: ConnectorConfig, d_vision: int, d_model: int, output_std: float | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(d_vision) if config.input_norm else nn.Identity()
        self.linear_1 = nn.Linear(d_vision, d_model, bias=config.bias)
        self.linear_2 = nn.Linear(d_model, d_model, bias=config.bias)
        if output_std is not None:
            self._scale_output(output_std)

    def n_tokens(self, n_features: int) -> int:
        """LM positions that `n_features` features take."""
        return n_features

    def forward(self, features: Tensor) -> Tensor:
        """Project features (b, n, d_vision) to embeddings (b, n, d_model), in the connector's dtype."""
        features = features.to(self.linear_1.weight.dtype)
        hidden = nn.functional.gelu(self.linear_1(self.norm(features)))  # (b, n, d_model)
        return self.linear_2(hidden)  # (b, n, d_model)

    @torch.no_grad()
    def _scale_output(self, output_std: float) -> None:
        probe = torch.randn(256, self.linear_1.in_features, generator=torch.Generator().manual_seed(0))
        self.linear_2.weight.mul_(output_std / self(probe).std())
        if self.linear_2.bias is not None:
            self.linear_2.bias.zero_()


def build_connector(
    config: ConnectorConfig, d_vision: int, d_model: int, output_std: float | None = None
) -> MlpConnector:
    """The connector that a config names."""
    return MlpConnector(config, d_vision, d_model, output_std)
