"""Linear layers whose weights lie as oneDNN's products want them, on CPUs; elsewhere they stay as they are.

A decoding step multiplies few rows by every weight of the LM, and most of its time goes into reading them. Laid out in
the order in which they are read, they are read at the speed of memory: products of a step take half the time or less.
`torch.compile` does the same to weights that it freezes. Does not know attention or sequences.

A product of as many rows as were not seen before is compiled, which takes milliseconds, and oneDNN keeps the last 1,024
kernels of some hundred kB each, so that a service would grow for hours. Here they are fewer, unless the environment
says how many; who pads lines as `padded_rows` says has hardly more of them.
"""

import os
import platform
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256
"""That weights are laid out for; others are multiplied too."""
_DTYPES = (torch.float32, torch.bfloat16)
_KERNELS = "256"
# Read by PyTorch's bridge to oneDNN and by oneDNN itself, each at its first product.
for _variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_variable, _KERNELS)


def padded_rows(n: int) -> int:
    """The next of the few numbers of rows that are worth a kernel: all to 16, then every eighth, from 64 every 16th."""
    step = 1 if n <= 16 else 8 if n <= 64 else 16
    return -(-n // step) * step


class PackedLinear(nn.Module):
    """As `nn.Linear`, for inference alone.

    Args:
        weight: (out, in).
        bias: (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.is_packed = is_packable(weight)
        # Not buffers: packed tensors are opaque, and neither saved nor moved.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if self.is_packed else weight
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., out) of x (..., in)."""
        return self._unary(x, "none") if self.is_packed else linear(x, self._weight, self._bias)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        return self._unary(x, "swish") if self.is_packed else silu(self(x))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other` (..., out)."""
        return self._binary(x, other, "mul") if self.is_packed else self(x) * other

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product and `other` (..., out), summed before they are rounded."""
        return self._binary(x, other, "add") if self.is_packed else self(x) + other

    def _unary(self, x: Tensor, after: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, after, [], "")
        return out

    def _binary(self, x: Tensor, other: Tensor, after: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, after)
        return out


def is_packable(weight: Tensor) -> bool:
    """Whether a weight can be packed here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and (weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(module: nn.Linear, *, shared: bool = False) -> PackedLinear:
    """Take over a linear layer, which is of no more use if its weight was packed: nothing is held twice.

    Args:
        shared: something else needs the weight, such as an embedding, so that it stays.
    """
    packed = PackedLinear(module.weight.data, None if module.bias is None else module.bias.data)
    if packed.is_packed and not shared:
        module.weight.data = module.weight.data.new_empty(0)
    return packed


def pack_linears(lm: "PreTrainedModel") -> None:
    """Put packed linear layers in the place of an LM's own, but for those that are quantized, adapted or hooked."""
    embedding = lm.get_input_embeddings().weight
    for name, module in list(lm.named_modules()):
        hooked = module._forward_pre_hooks or module._forward_hooks
        if type(module) is nn.Linear and is_packable(module.weight) and not hooked and ".lora_" not in name:
            lm.set_submodule(name, pack(module, shared=module.weight is embedding))
