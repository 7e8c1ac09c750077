"""Several LoRA adapters over one base LM, in one step (as Punica and S-LoRA do: arXiv:2310.18547, 2311.03285).

In: adapters in peft's format, and which positions of a step's line belong to which. Out: linear layers that add to the
base's product what each position's adapter adds, B A x. Positions of an adapter are gathered, so that a step costs one
product with the base, whoever's positions it holds, and two thin ones for each adapter in it. Does not know sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from mmllm_core.engine.packed_linear import PackedLinear
from mmllm_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
"""Of every name in peft's files."""


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter, ready to be applied. Requests hold it; when none does, it is gone."""

    name: str
    folder: Path
    weights: dict[str, tuple[Tensor, Tensor]]  # of each linear layer, A (r, d_in) and B (d_out, r), B scaled
    _joined: dict[str, tuple[Tensor, Tensor] | None] = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int:
        """The largest of its layers' ranks."""
        return max((len(down) for down, _ in self.weights.values()), default=0)

    def of(self, parts: "tuple[Part, ...]", d_out: int) -> tuple[Tensor, Tensor] | None:
        """A (r, d_in) and B (d_out, r) of layers whose products are computed as one; None where it adds nothing."""
        key = "+".join(f"{part.layer}[{part.begin}]" for part in parts)
        if key not in self._joined:
            self._joined[key] = self._join(parts, d_out)
        return self._joined[key]

    def _join(self, parts: "tuple[Part, ...]", d_out: int) -> tuple[Tensor, Tensor] | None:
        found = [(part, *self.weights[part.layer]) for part in parts if part.layer in self.weights]
        if not found:
            return None
        down = torch.cat([a for _, a, _ in found])  # (r of all, d_in)
        up = down.new_zeros(d_out, len(down))
        rank = 0
        for part, a, b in found:
            own = b[part.begin : part.end]  # (d_out of the part, r)
            up[part.at : part.at + len(own), rank : rank + len(a)] = own
            rank += len(a)
        return down, up


@dataclass(frozen=True)
class Part:
    """A linear layer of the LM, by name, or some of its rows, at its place in a product of several."""

    layer: str
    at: int = 0
    begin: int = 0
    end: int | None = None


class LineAdapters:
    """Which positions of the line that is computed now belong to which adapter; shared by all adapted layers."""

    def __init__(self) -> None:
        self.groups: list[tuple[LoraAdapter, Tensor | None]] = []
        """Positions int64 (n,) of each adapter; None for all."""

    def set(self, spans: Sequence[tuple[LoraAdapter | None, int]], device: torch.device | str) -> None:
        """Say whose the line is.

        Args:
            spans: of each sequence in the line's order its adapter, None for the base alone, and its positions.
        """
        owners: dict[int, tuple[LoraAdapter, list[Tensor]]] = {}
        begin = 0
        for adapter, n in spans:
            if adapter is not None:
                owners.setdefault(id(adapter), (adapter, []))[1].append(torch.arange(begin, begin + n))
            begin += n
        whole = len(owners) == 1 and all(adapter is not None for adapter, _ in spans)
        self.groups = [(a, None if whole else torch.cat(rows).to(device)) for a, rows in owners.values()]

    def keep(self, places: Tensor) -> None:
        """Go on with some positions of the line alone, int64 (n,)."""
        kept = []
        for adapter, rows in self.groups:
            mine = None if rows is None else torch.isin(places, rows).nonzero().flatten()
            if mine is None or len(mine):
                kept.append((adapter, mine))
        self.groups = kept


class LoraLinear(nn.Module):
    """A linear layer of the base, of several that are computed as one, to which each position's adapter adds.

    Args:
        base: (..., d_in) -> (..., d_out).
        parts: the layers that it computes.
    """

    def __init__(self, base: Any, parts: tuple[Part, ...], line: LineAdapters):
        super().__init__()
        self.base = base
        self._parts = parts
        self._line = line

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_out) of x (..., d_in)."""
        y = self.base(x)
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for adapter, rows in self._line.groups:
            if (found := adapter.of(self._parts, y.shape[-1])) is None:
                continue
            down, up = found
            own = flat if rows is None else flat.index_select(0, rows)
            update = linear(linear(own.to(down.dtype), down), up).to(out.dtype)  # (n, d_out)
            out = out + update if rows is None else out.index_add(0, rows, update)
        adapted: Tensor = out.view(y.shape)
        return adapted

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        return silu(self(x)) if self._line.groups else self.base.silu(x)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other` (..., d_out)."""
        product: Tensor = self(x) * other if self._line.groups else self.base.times(x, other)
        return product

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product and `other` (..., d_out)."""
        total: Tensor = self(x) + other if self._line.groups else self.base.plus(x, other)
        return total


def adapt_linears(lm: "PreTrainedModel", line: LineAdapters) -> None:
    """Let every linear layer of an LM's blocks, packed or quantized as it may be, take adapters."""
    for name, module in list(lm.base_model.named_modules(prefix=lm.base_model_prefix)):
        if isinstance(module, nn.Linear | PackedLinear):
            lm.set_submodule(name, LoraLinear(module, (Part(name),), line))


def adaptable_layers(lm: "PreTrainedModel") -> dict[str, tuple[int, int]]:
    """Names of the linear layers of an LM's blocks, as it was loaded, with their (d_out, d_in)."""
    modules = lm.base_model.named_modules(prefix=lm.base_model_prefix)
    return {name: (m.out_features, m.in_features) for name, m in modules if isinstance(m, nn.Linear)}


def load_lora(
    folder: Path,
    name: str,
    layers: dict[str, tuple[int, int]],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> LoraAdapter:
    """Read an adapter in peft's format, to be applied without changing the LM.

    Args:
        layers: of the LM (`adaptable_layers`).
        dtype: that the LM is computed in.

    Raises:
        ConfigError: it does more than add to these layers, or was trained on an LM of another shape.
    """
    from safetensors.torch import load_file

    config = require_plain_lora(folder, name)
    where = f"adapter '{name}'"
    halves = load_file(folder / "adapter_model.safetensors", device=str(device))
    weights = {}
    for key in [key for key in halves if key.endswith(".lora_A.weight")]:
        layer = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        down, up = halves.pop(key), halves.pop(key.replace(".lora_A.", ".lora_B."))
        if layers.get(layer) != (up.shape[0], down.shape[1]):
            raise ConfigError(f"{where}: adapts '{layer}' of {up.shape[0]} times {down.shape[1]}, which the LM has not")
        rank = len(down)
        scaling = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
        weights[layer] = (down.to(dtype), (up.float() * scaling).to(dtype))
    if halves:
        raise ConfigError(f"{where}: holds '{next(iter(halves))}', which is no part of a LoRA layer")
    return LoraAdapter(name, folder, weights)


def require_plain_lora(folder: Path, name: str) -> Any:
    """The config of an adapter that can be applied beside others, as peft reads it.

    Raises:
        ConfigError: it does more than add B A x to linear layers.
    """
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(folder))
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ConfigError(f"adapter '{name}': is {config.peft_type} and only LoRA can be applied beside others")
    more = ("modules_to_save", "use_dora", "lora_bias", "alpha_pattern", "trainable_token_indices")
    used = ["bias"] if config.bias != "none" else [key for key in more if getattr(config, key, None)]
    if used:
        raise ConfigError(f"adapter '{name}': uses {used[0]}, and only plain LoRA can be applied beside others")
    return config
