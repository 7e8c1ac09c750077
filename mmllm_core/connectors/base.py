"""What every connector promises."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm_core.config import ConnectorConfig


@dataclass(frozen=True)
class LmShape:
    """What a connector has to know of the LM that it leads to."""

    d_model: int
    n_layers: int

    @classmethod
    def of(cls, config: Any) -> "LmShape":
        """The shape of a Hugging Face causal LM, by its config."""
        return cls(d_model=int(config.hidden_size), n_layers=int(config.num_hidden_layers))

    @classmethod
    def read(cls, folder: Path) -> "LmShape":
        """The shape of the LM in a folder, by its `config.json`."""
        from transformers import AutoConfig

        return cls.of(AutoConfig.from_pretrained(folder, local_files_only=True))


class Connector(nn.Module):
    """Features (b, n, d_vision) -> embeddings (b, m, d_model).

    Args:
        config: which connector this is, and of what size.
        d_vision: width of a feature.
        d_model: width of an LM embedding.
    """

    def __init__(self, config: ConnectorConfig, d_vision: int, d_model: int):
        super().__init__()
        self.config = config
        self.d_vision = d_vision
        self.d_model = d_model

    def n_tokens(self, n_features: int) -> int:
        """LM positions that an image of `n_features` features takes."""
        return self.config.n_tokens(n_features)

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings (b, m, d_model) of features (b, n, d_vision), in the connector's own dtype."""
        raise NotImplementedError

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that embeddings come out of."""
        raise NotImplementedError

    def place(self, features: Tensor) -> Tensor:
        """What stands in the prompt for images with features (n_images, n, d_vision): (n_images, n_tokens, d_model)."""
        embeddings: Tensor = self(features)
        return embeddings

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the embeddings."""
        return self.last_layer.weight.dtype

    @torch.no_grad()
    def scale_output(self, std: float) -> None:
        """Scale the last layer so that random features give embeddings of this root mean square."""
        probe = torch.randn(4, 64, self.d_vision, generator=torch.Generator().manual_seed(0))  # (b, n, d_vision)
        self.last_layer.weight.mul_(std / self(probe).std())
        if self.last_layer.bias is not None:
            self.last_layer.bias.zero_()
