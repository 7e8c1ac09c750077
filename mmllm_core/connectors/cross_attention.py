"""Gated cross-attention: the LM's layers look at the images, and the prompt is left to text.

In: features (n_images, n, d_vision), and where the prompt marks images. Out: the LM's hidden states, moved by what the
images show. Source: Flamingo (Alayrac et al., 2022, arXiv:2204.14198): blocks stand before every k-th layer of the LM,
each position looks at the image that was marked last before it, and gates of zero make the untrained model equal the
text model. Earlier images reach a position through the LM's own attention to their markers.

Unlike Flamingo, positions with no image before them pass the blocks untouched, feed-forward layers included: without
an adapter, a conversation of text alone is answered exactly as the text model answers it, at any stage of training.

Blocks act through forward pre-hooks, so the LM keeps its class and the names of its weights: adapters, quantization and
checkpoints do not notice them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmllm_core.config import CrossAttentionConfig
from mmllm_core.connectors.base import Connector, LmShape
from mmllm_core.connectors.resampler import PerceiverResampler, feed_forward, split_heads
from mmllm_core.errors import ConfigError


@dataclass
class Media:
    """What one forward of the LM, or all steps of a generation, may look at."""

    embeddings: Tensor  # (n_images, m, d_model)
    image_of: Tensor
    """int64 (b, t): the row of `embeddings` that each position of the prompt looks at, -1 for none."""
    keys_values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def rows(self, n_positions: int) -> Tensor:
        """`image_of` for a forward of `n_positions`: the prompt, or what follows it and looks where it ended."""
        if n_positions == self.image_of.shape[1]:
            return self.image_of
        return self.image_of[:, -1:].expand(-1, n_positions)


class CrossAttentionConnector(Connector):
    """Resamples features, and holds the blocks that let LM layers attend to them.

    Raises:
        ConfigError: the LM has fewer layers than `every_k_layers`.
    """

    def __init__(self, config: CrossAttentionConfig, d_vision: int, lm: LmShape):
        super().__init__(config, d_vision, lm.d_model)
        if config.every_k_layers > lm.n_layers:
            raise ConfigError(
                f"connector.every_k_layers: {config.every_k_layers} and the LM has only {lm.n_layers} layers: lower it"
            )
        self.resampler = PerceiverResampler(config, d_vision)
        self.linear = nn.Linear(d_vision, lm.d_model)
        self.marker = nn.Parameter(torch.zeros(lm.d_model))
        """Embedding of the one position that marks where an image was put."""
        layers = range(config.every_k_layers - 1, lm.n_layers, config.every_k_layers)
        self.blocks = nn.ModuleDict(
            {str(i): GatedCrossAttention(lm.d_model, config.head_dim, config.gate_rate) for i in layers}
        )
        self._media: Media | None = None

    @property
    def last_layer(self) -> nn.Linear:
        """From the resampler's width to the LM's."""
        return self.linear

    def place(self, features: Tensor) -> Tensor:
        """The marker, once for each image: (n_images, 1, d_model)."""
        return self.marker.expand(len(features), 1, -1)

    def forward(self, features: Tensor) -> Tensor:
        """Resample features (n_images, n, d_vision) to what layers attend to (n_images, n_queries, d_model)."""
        media: Tensor = self.linear(self.resampler(features.to(self.dtype)))
        return media

    def attach(self, decoder: Any) -> None:
        """Let the layers of a Hugging Face decoder (`causal_lm.base_model`) pass through the blocks.

        Raises:
            ConfigError: the decoder keeps its layers elsewhere than Llama, Phi and most others do.
        """
        if not hasattr(decoder, "layers"):
            raise ConfigError(
                f"connector cross_attention: {type(decoder).__name__} has no 'layers' to stand before: choose another "
                "connector or LM"
            )
        for index, block in self.blocks.items():
            decoder.layers[int(index)].register_forward_pre_hook(self._hook(index, block))

    def show(self, media: Media | None) -> None:
        """Set what the LM looks at from now on; None for text alone.

        It stays until the next call, because gradient checkpointing runs layers again during the backward pass.
        Checkpointing must not be reentrant (it is not by default): all layers look at one tensor, which reentrant
        checkpointing would send gradients to more than once.
        """
        self._media = media

    def _hook(self, index: str, block: nn.Module) -> Any:
        def look(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._media is None:
                return None
            hidden, *rest = args  # (b, t, d_model)
            return block(hidden, self._media, index), *rest

        return look


def last_image(is_image: Tensor, starts: Tensor | None) -> Tensor:
    """Which image each position looks at: the one marked last in its conversation, the position itself included.

    Args:
        is_image: bool (b, t), true where an image is marked.
        starts: int64 (b, t), where in the row each position's conversation begins; None for one a row.

    Returns:
        int64 (b, t): the image's number over the whole batch in order of appearance, -1 for none.
    """
    in_row = is_image.cumsum(1)  # (b, t): images of the row so far
    before = 0 if starts is None else (in_row - is_image.long()).gather(1, starts)  # of other conversations
    number = is_image.flatten().cumsum(0).view_as(in_row) - 1
    return torch.where(in_row > before, number, -1)


class GatedCrossAttention(nn.Module):
    """One block; two gates that start shut scale what attention and feed-forward layer add."""

    def __init__(self, d_model: int, head_dim: int, gate_rate: float):
        super().__init__()
        self.gate_rate = gate_rate
        self.n_heads = max(1, d_model // head_dim)
        inner = self.n_heads * head_dim
        self.norm = nn.LayerNorm(d_model)
        self.to_q = nn.Linear(d_model, inner, bias=False)
        self.to_kv = nn.Linear(d_model, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, d_model, bias=False)
        self.feed_forward = feed_forward(d_model)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, media: Media, name: str) -> Tensor:
        """Hidden states (b, t, d_model) that have looked at the images; `name` tells blocks apart."""
        rows = media.rows(hidden.shape[1])  # (b, t)
        sees = (rows >= 0).unsqueeze(-1)  # (b, t, 1)
        x = hidden.to(self.to_q.weight.dtype)
        q = split_heads(self.to_q(self.norm(x)), self.n_heads)  # (b, h, t, d_head)
        k, v = self._keys_values(media, name)  # (1, h, n_images * m, d_head)
        m = media.embeddings.shape[1]
        owner = torch.arange(len(media.embeddings), device=rows.device).repeat_interleave(m)  # (n_images * m,)
        # A position that sees nothing may attend to everything, for softmax needs something; it is masked below.
        mask = (owner == rows.unsqueeze(-1)) | ~sees  # (b, t, n_images * m)
        batch = len(hidden)
        attended = nn.functional.scaled_dot_product_attention(
            q, k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), attn_mask=mask.unsqueeze(1)
        )  # (b, h, t, d_head)
        moved = x + self._opening(self.attention_gate) * self.to_out(attended.transpose(1, 2).flatten(2))
        moved = moved + self._opening(self.feed_forward_gate) * self.feed_forward(moved)
        return torch.where(sees, moved.to(hidden.dtype), hidden)

    def _opening(self, gate: Tensor) -> Tensor:
        return (self.gate_rate * gate).tanh()

    def _keys_values(self, media: Media, name: str) -> tuple[Tensor, Tensor]:
        """Keys and values (1, h, n_images * m, d_head), computed once for all steps of a generation."""
        # Not under mere no_grad: a forward that is run again for its gradients must not find what was remembered.
        remembers = torch.is_inference_mode_enabled()
        if remembers and name in media.keys_values:
            return media.keys_values[name]
        flat = media.embeddings.to(self.to_kv.weight.dtype).flatten(0, 1).unsqueeze(0)  # (1, n_images * m, d_model)
        k, v = (split_heads(x, self.n_heads) for x in self.to_kv(flat).chunk(2, dim=-1))
        if remembers:
            media.keys_values[name] = (k, v)
        return k, v
