"""What autograd keeps of a forward pass for the backward pass, counted.

In: a forward pass and the module it runs. Out: bytes. Does not know which module it is.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def kept_bytes(forward: Callable[[], Any], module: "nn.Module") -> int:
    """Bytes that autograd keeps for the backward pass of a forward; tensors of one storage count once, weights never.

    Works on the `meta` device too, where nothing is computed.
    """
    import torch

    own = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
        total: int = sum(storage.nbytes() for storage in kept.values())
    del result
    return total
