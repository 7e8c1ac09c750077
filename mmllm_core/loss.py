"""The language-modelling loss: hidden states -> cross-entropy, without the logits of all positions at once.

In: hidden states that carry loss (n, d_model), the LM's head and the tokens they should predict. Out: a float32 sum.
Logits are made a few rows at a time and turned into gradients at once, as Liger (Hsu et al., 2024, arXiv:2410.10989)
and Apple's CCE (Wijmans et al., 2024, arXiv:2411.09009) do: what is kept for the backward pass is a gradient of the
size of the hidden states, and one of the size of the head if that is trained. On GPUs Liger's own kernel does it when
`liger-kernel` is installed. Does not know which positions carry loss, nor the LM.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**26}
"""Logits that are held at once, in the head's dtype. With fewer rows, multiplications would wait for the head's weight;
with more, nothing is faster."""
FLOATS_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
"""Of those, logits that are float32 at once: on CPUs as many as stay in a core's cache."""


def summed_cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a head's predictions, summed.

    Equal to `cross_entropy(head(hidden).float(), targets, reduction="sum")`, gradients included. In bfloat16 logits
    are rounded to bfloat16 and everything after them is float32, as there; gradients with respect to logits are
    rounded to bfloat16 before they are scaled by the gradient of the sum, not after.

    Gradients are computed once, in the forward pass: the sum cannot be differentiated twice.

    Args:
        head: what makes logits of hidden states. A head that is more than a linear layer, such as one with an
            adapter, is called as it is, and all its logits are held.
        hidden: (n, d_model); with n = 0 the sum is 0 and gradients are zeros.
        targets: int64 (n,), every one a row of the head.

    Returns:
        float32 scalar.
    """
    if type(head) is not nn.Linear:
        return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")
    # ZeRO-3 gathers a weight when its module is called, as often on one worker as on all others: so once, and
    # everything that needs the weight is done within the call.
    linear: Any = head
    linear.forward = lambda rows: _of_linear(rows, linear.weight, linear.bias, targets)
    try:
        total: Tensor = linear(hidden)
        return total
    finally:
        del linear.forward


def _of_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    total: Tensor
    if hidden.is_cuda and len(hidden) and _has_liger():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        total = liger_fused_linear_cross_entropy(
            hidden, weight, targets, bias=bias, reduction="sum", accum_dtype=torch.float32
        )
        return total
    total = _LinearCrossEntropy.apply(hidden, weight, bias, targets, torch.is_grad_enabled())
    return total


@cache
def _has_liger() -> bool:
    return find_spec("liger_kernel") is not None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, differentiable: bool
    ) -> Tensor:
        wanted = [differentiable and needed for needed in ctx.needs_input_grad[:3]]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None  # (n, d_model)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None  # (vocab, d_model)
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None  # (vocab,)
        vocabulary, d_model = weight.shape
        n_rows = _rows(LOGITS_AT_ONCE, hidden, vocabulary)
        if grad_weight is not None:  # every chunk reads and writes all of it: chunks a quarter as large cost that much
            n_rows = max(n_rows, d_model // 4)
        buffer = hidden.new_empty(min(n_rows, len(hidden)), vocabulary)
        n_block = _rows(FLOATS_AT_ONCE, hidden, vocabulary)
        for start in range(0, len(hidden), n_rows):
            chunk = slice(start, start + n_rows)
            rows, labels = hidden[chunk], targets[chunk]  # (c, d_model), (c,)
            logits = buffer[: len(rows)]  # (c, vocab)
            if bias is None:
                torch.mm(rows, weight.T, out=logits)
            else:
                torch.addmm(bias, rows, weight.T, out=logits)
            for block, block_labels in zip(logits.split(n_block), labels.split(n_block), strict=True):
                total += _loss_and_gradient(block, block_labels.unsqueeze(1))
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight += logits.T @ rows
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None


def _rows(limits: dict[str, int], hidden: Tensor, vocabulary: int) -> int:
    return max(1, limits.get(hidden.device.type, limits["cuda"]) // vocabulary)


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the loss of logits (c, vocab) with labels (c, 1), and put in their place its gradient: softmax - one hot."""
    exact = logits.float()  # (c, vocab); no copy if they are float32
    right = exact.gather(1, labels)  # (c, 1)
    largest = exact.amax(1, keepdim=True)
    exp = exact.sub_(largest).exp_()
    norm = exp.sum(1, keepdim=True)
    loss = (norm.log() + largest - right).sum()
    logits.copy_(exp.div_(norm).scatter_add_(1, labels, torch.full_like(right, -1)))
    return loss
