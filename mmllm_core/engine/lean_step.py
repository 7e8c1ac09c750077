"""A step of Llama and Phi-3, derived from the LM's own weights, without what transformers' forward does besides.

Queries, keys and values come of one product, and what follows a product is computed with it. The LM gives its weights
up, so that nothing is held twice. In float32 logits equal the LM's own to rounding. Does not know requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm

from mmllm_core.engine.lora import LineAdapters, LoraLinear, Part
from mmllm_core.engine.packed_linear import PackedLinear, pack, padded_rows
from mmllm_core.engine.paged_attention import KvCache, StepLayout, attend
from mmllm_core.engine.rope import Rope, RopeOfLine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("llama", "phi3")


_Linear = PackedLinear | LoraLinear


@dataclass(frozen=True)
class _Layer:
    norm: Tensor  # (d_model,)
    qkv: _Linear  # d_model -> (h + 2 h_kv) d
    out: _Linear  # h d -> d_model
    mlp_norm: Tensor  # (d_model,)
    gate: _Linear  # d_model -> d_mlp
    up: _Linear  # d_model -> d_mlp
    down: _Linear  # d_mlp -> d_model


class LeanStep:
    """As `mmllm_core.engine.step.Step`, for an LM that `is_lean`."""

    shares_prefixes = True

    def __init__(
        self, lm: "PreTrainedModel", cache: KvCache, context_length: int, adapters: LineAdapters | None = None
    ):
        decoder: Any = lm.base_model
        self._cache = cache
        self._adapters = adapters
        self._layers = [
            _derived(layer) if adapters is None else _adapted(layer, f"{lm.base_model_prefix}.layers.{i}", adapters)
            for i, layer in enumerate(decoder.layers)
        ]
        self._norm = decoder.norm.weight
        embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
        self._head = pack(head, shared=head.weight is embedding.weight)  # d_model -> vocab
        self._rope = RopeOfLine.of(lm, context_length)
        config = lm.config
        self._n_heads = config.num_attention_heads
        self._n_kv_heads = config.num_key_value_heads
        self._eps = config.rms_norm_eps
        self._window = getattr(config, "sliding_window", None) if config.model_type == "phi3" else None
        self._scaling = decoder.layers[0].self_attn.scaling

    def rope_of(self, limit: int) -> Rope:
        """As `Step`."""
        return self._rope.kind(limit)

    def release(self, page: int) -> None:
        """As `Step`: all is in the cache."""

    @torch.inference_mode()
    def __call__(self, embeddings: Tensor, layout: StepLayout, ropes: Sequence[Rope]) -> Tensor:
        """As `Step`."""
        self._rope.tell(ropes, layout.rows)
        cos, sin = (x[0].unsqueeze(1) for x in self._rope(embeddings.unsqueeze(0), layout.positions.unsqueeze(0)))
        sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], -1)  # (t, 1, d_rotated)
        hidden = self._padded(embeddings)  # (t padded, d_model)
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            attended = self._attend(i, layer, hidden, layout, cos, sin)  # (t, h d)
            if i == last:  # what else the line holds has given its keys and values
                hidden, attended = self._padded(hidden[layout.last]), attended[layout.last]
                if self._adapters is not None:
                    self._adapters.keep(layout.last)
            hidden = layer.out.plus(self._padded(attended), hidden)
            normed = self._normed(hidden, layer.mlp_norm)
            hidden = layer.down.plus(layer.up.times(normed, layer.gate.silu(normed)), hidden)
        logits: Tensor = self._head(self._normed(hidden, self._norm))  # (n_last padded, vocab)
        return logits[: len(layout.last)]

    def _attend(self, i: int, layer: _Layer, hidden: Tensor, layout: StepLayout, cos: Tensor, sin: Tensor) -> Tensor:
        joined = layer.qkv(self._normed(hidden, layer.norm))[: len(layout.positions)]
        heads = joined.unflatten(1, (self._n_heads + 2 * self._n_kv_heads, -1))  # (t, h + 2 h_kv, d)
        n = self._n_heads + self._n_kv_heads
        rotated, value = _rotated(heads[:, :n], cos, sin), heads[:, n:]
        self._cache.write(i, rotated[:, self._n_heads :], value, layout.slots)
        return attend(rotated[:, : self._n_heads], i, self._cache, layout, self._scaling, self._window).flatten(1)

    def _padded(self, line: Tensor) -> Tensor:
        """With rows of zeros at its end, which nobody reads, where that spares a kernel."""
        more = padded_rows(len(line)) - len(line) if self._head.is_packed else 0
        return pad(line, (0, 0, 0, more)) if more else line

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, weight.shape, weight, self._eps)


def is_lean(lm: "PreTrainedModel") -> bool:
    """Whether a `LeanStep` can be derived from an LM: of the families, with plain weights, and nothing set into it."""
    config = lm.config
    if config.model_type not in FAMILIES or config.hidden_act != "silu":
        return False
    layers = [module for layer in lm.base_model.layers for module in layer.modules()]
    linears = [module for module in layers if hasattr(module, "in_features")]
    plain = all(type(module) is nn.Linear and module.bias is None for module in linears)
    hooked = any(module._forward_pre_hooks or module._forward_hooks for module in layers)
    head = lm.get_output_embeddings()
    return plain and not hooked and type(head) is nn.Linear and head.bias is None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads (t, n, d), or of their first part where only that is rotated; `sin` with its signs."""
    d = cos.shape[-1]
    turning = heads[..., :d]
    turned = turning * cos + turning.roll(d // 2, -1) * sin
    return turned if d == heads.shape[-1] else torch.cat([turned, heads[..., d:]], -1)


def _derived(layer: Any) -> _Layer:
    """A layer's weights, which it gives up."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        qkv = [attention.qkv_proj]
        gate, up = (PackedLinear(weight) for weight in mlp.gate_up_proj.weight.data.chunk(2))
        given_up = [mlp.gate_up_proj]
    else:
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        gate, up, given_up = pack(mlp.gate_proj), pack(mlp.up_proj), []
    joined = PackedLinear(torch.cat([module.weight.data for module in qkv]))
    for module in (*qkv, *given_up):
        module.weight.data = module.weight.data.new_empty(0)
    return _Layer(
        layer.input_layernorm.weight.data,
        joined,
        pack(attention.o_proj),
        layer.post_attention_layernorm.weight.data,
        gate,
        up,
        pack(mlp.down_proj),
    )


def _adapted(layer: Any, name: str, line: LineAdapters) -> _Layer:
    """As `_derived`, of linear layers that take adapters.

    Args:
        name: of the layer in its LM.
    """
    attention, mlp = layer.self_attn, layer.mlp
    attn, ffn = f"{name}.self_attn", f"{name}.mlp"
    if hasattr(attention, "qkv_proj"):
        qkv: tuple[Part, ...] = (Part(f"{attn}.qkv_proj"),)
        half = mlp.gate_up_proj.out_features // 2
        gate = Part(f"{ffn}.gate_up_proj", end=half)
        up = Part(f"{ffn}.gate_up_proj", begin=half)
    else:
        n_q, n_kv = attention.q_proj.out_features, attention.k_proj.out_features
        places = {"q_proj": 0, "k_proj": n_q, "v_proj": n_q + n_kv}
        qkv = tuple(Part(f"{attn}.{part}", at) for part, at in places.items())
        gate, up = Part(f"{ffn}.gate_proj"), Part(f"{ffn}.up_proj")
    plain = _derived(layer)
    return replace(
        plain,
        qkv=LoraLinear(plain.qkv, qkv, line),
        out=LoraLinear(plain.out, (Part(f"{attn}.o_proj"),), line),
        gate=LoraLinear(plain.gate, (gate,), line),
        up=LoraLinear(plain.up, (up,), line),
        down=LoraLinear(plain.down, (Part(f"{ffn}.down_proj"),), line),
    )
