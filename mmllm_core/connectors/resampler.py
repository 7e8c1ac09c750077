"""A fixed number of embeddings from any number of features: the Perceiver resampler of Flamingo.

In: features (b, n, d_vision). Out: embeddings (b, n_queries, d_model). Large images cost the LM no more positions than
small ones. Source: Alayrac et al., 2022, arXiv:2204.14198, appendix A.1.1.
"""

import torch
from torch import Tensor, nn

from mmllm_core.config import QueriesConfig, ResamplerConfig
from mmllm_core.connectors.base import Connector, LmShape


class ResamplerConnector(Connector):
    """Learned queries that read the features; the queries' outputs are spliced into the prompt."""

    def __init__(self, config: ResamplerConfig, d_vision: int, lm: LmShape):
        super().__init__(config, d_vision, lm.d_model)
        self.resampler = PerceiverResampler(config, d_vision)
        self.linear = nn.Linear(d_vision, lm.d_model)

    @property
    def last_layer(self) -> nn.Linear:
        """From the resampler's width to the LM's."""
        return self.linear

    def forward(self, features: Tensor) -> Tensor:
        """Resample features (b, n, d_vision) to embeddings (b, n_queries, d_model)."""
        embeddings: Tensor = self.linear(self.resampler(features.to(self.dtype)))
        return embeddings


class PerceiverResampler(nn.Module):
    """Features (b, n, d_vision) -> (b, n_queries, d_vision).

    Args:
        config: how many queries, blocks and heads.
        d_vision: width of a feature, kept throughout.
    """

    def __init__(self, config: QueriesConfig, d_vision: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.n_queries, d_vision) * d_vision**-0.5)
        self.blocks = nn.ModuleList(_ResamplerBlock(d_vision, config.head_dim) for _ in range(config.depth))
        self.norm = nn.LayerNorm(d_vision)

    def forward(self, features: Tensor) -> Tensor:
        """(b, n, d_vision) -> (b, n_queries, d_vision)."""
        queries = self.queries.expand(len(features), -1, -1)  # (b, n_queries, d_vision)
        for block in self.blocks:
            queries = block(queries, features)
        normed: Tensor = self.norm(queries)
        return normed


class _ResamplerBlock(nn.Module):
    """Queries attend to features and to themselves, then pass through a feed-forward layer."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.n_heads = max(1, width // head_dim)
        inner = self.n_heads * head_dim
        self.norm_queries = nn.LayerNorm(width)
        self.norm_features = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.feed_forward = feed_forward(width)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """Queries (b, q, width) that have read features (b, n, width)."""
        normed = self.norm_queries(queries)
        read = torch.cat([self.norm_features(features), normed], dim=1)  # (b, n + q, width)
        q = split_heads(self.to_q(normed), self.n_heads)  # (b, h, q, d_head)
        k, v = (split_heads(x, self.n_heads) for x in self.to_kv(read).chunk(2, dim=-1))  # (b, h, n + q, d_head)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)  # (b, h, q, d_head)
        queries = queries + self.to_out(attended.transpose(1, 2).flatten(2))
        updated: Tensor = queries + self.feed_forward(queries)
        return updated


def feed_forward(width: int) -> nn.Sequential:
    """Flamingo's feed-forward layer: norm, four times the width, GELU, back."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """(b, t, h * d_head) -> (b, h, t, d_head)."""
    heads: Tensor = x.unflatten(-1, (n_heads, -1)).transpose(1, 2)
    return heads
