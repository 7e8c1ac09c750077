"""How much arithmetic a training step is, and how much of the device's peak that makes: MFU.

In: a model, or its counts, and what a step held. Out: floating-point operations; memory that this process took. Does
not know recipes, and does not time anything.

A weight costs a position 2 operations forward, 2 for the gradient of its input and 2 for its own gradient (Kaplan et
al., arXiv:2001.08361, section 2.1): 6 for one that is trained, and 4 for a frozen one that a gradient passes on its way
to an adapter or a connector, as in LoRA (Hu et al., arXiv:2106.09685). Attention adds 12 t a d to each position of a
layer, for conversations of t positions and a heads of width d (PaLM: Chowdhery et al., arXiv:2204.02311, appendix B).
As there, what gradient checkpointing computes again counts for nothing: MFU is of the work that the model asks for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mmllm_core.model import MultimodalLM

_TRAINED, _PASSED, _FORWARD = 6, 4, 2


@dataclass(frozen=True)
class ModelWork:
    """Weights of a multimodal LM by what they cost: only those that multiply count, so no embeddings and no norms."""

    n_frozen: int
    """Of the LM's layers, passed by a gradient."""
    n_trained: int
    """Of the LM's layers, or of the adapter in them."""
    n_connector: int
    connector_trained: bool
    n_head: int
    """d_model times vocabulary."""
    head_trained: bool
    n_layers: int
    attention_width: int
    """Heads times their width."""
    n_vision: int = 0
    """Of the vision tower, where it runs in training."""
    vision_trained: bool = False

    @classmethod
    def of(cls, model: "MultimodalLM", vision: "torch.nn.Module | None" = None) -> "ModelWork":
        """Count a model, whichever way its weights are quantized; before DeepSpeed shards it.

        Args:
            vision: CLIP's tower, if training runs it.
        """
        lm: Any = model.causal_lm
        config = lm.config
        head = lm.get_output_embeddings()
        frozen, trained = _linear_weights(lm.base_model)
        vision_weights = _linear_weights(vision) if vision is not None else (0, 0)
        # Cross-attention blocks are the connector's, wherever in the LM they were set.
        connector = sum(_linear_weights(model.connector))
        n_heads = config.num_attention_heads
        return cls(
            n_frozen=frozen,
            n_trained=trained,
            n_connector=connector,
            connector_trained=any(p.requires_grad for p in model.connector.parameters()),
            n_head=head.in_features * head.out_features,
            head_trained=any(p.requires_grad for p in head.parameters()),
            n_layers=config.num_hidden_layers,
            attention_width=n_heads * (getattr(config, "head_dim", None) or config.hidden_size // n_heads),
            n_vision=sum(vision_weights),
            vision_trained=vision_weights[1] > 0,
        )

    def step_flops(
        self, tokens: float, mean_length: float, n_supervised: float, n_features: float = 0, n_patches: float = 0
    ) -> float:
        """Floating-point operations of one step, forward and backward.

        Args:
            tokens: positions that the step computes, over all micro-batches.
            mean_length: positions of a conversation, what it shares with others included: what attention sees at once.
            n_supervised: positions at which logits are computed.
            n_features: feature vectors that go through the connector.
            n_patches: tokens that go through the vision tower, if it runs.
        """
        layers = _PASSED * self.n_frozen + _TRAINED * self.n_trained
        attention = 12 * self.n_layers * mean_length * self.attention_width
        head = (_TRAINED if self.head_trained else _PASSED) * self.n_head
        connector = (_TRAINED if self.connector_trained else _FORWARD) * self.n_connector
        vision = (_TRAINED if self.vision_trained else _FORWARD) * self.n_vision
        return tokens * (layers + attention) + n_supervised * head + n_features * connector + n_patches * vision


def memory_gb(device: "torch.device | str" = "cpu") -> float:
    """Most memory that this process has taken so far, in 1e9 bytes: of the GPU in tensors, or of the machine."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 1e9
    return peak_resident() / 1e9


def peak_resident(pid: int | str = "self") -> int:
    """Most resident memory of a process so far, in bytes, by the kernel's own mark where it keeps one."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        return int(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) * 1024
    import psutil

    return int(psutil.Process(None if pid == "self" else int(pid)).memory_info().rss)


def _linear_weights(module: "torch.nn.Module") -> tuple[int, int]:
    """Weights of a module's linear layers and convolutions: frozen ones, and trained ones."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    counts = [0, 0]
    for part in module.modules():
        if isinstance(part, nn.Linear):
            n = part.in_features * part.out_features  # a 4-bit weight is packed, and its own size tells nothing
        elif isinstance(part, nn.Conv2d | Conv1D):
            n = part.weight.numel()
        elif isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            n = part.in_proj_weight.numel()  # its output projection is a linear layer of its own
        else:
            continue
        weight = getattr(part, "weight", None)
        weight = part.in_proj_weight if weight is None else weight
        counts[bool(weight.requires_grad)] += n
    return counts[0], counts[1]
