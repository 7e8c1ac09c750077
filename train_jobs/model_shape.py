"""What of a model decides memory and time: counts of parameters and widths, from configs alone.

In: a recipe, its profile, and the LM's `config.json`. Out: a `ModelShape`. Models are built on torch's
`meta` device, where tensors have shapes and no numbers: no weight is read. Does not know bytes of training or batches.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mmllm_core.config import (
    CrossAttentionConfig,
    LoraConfig,
    Part,
    Profile,
    Quantization,
    Recipe,
)
from mmllm_core.errors import ConfigError, WeightsError, first_line
from mmllm_core.models.resolve import resolve
from mmllm_core.packed_attention import require_packable
from train_jobs.kept_bytes import kept_bytes
from train_jobs.throughput import ModelWork
from train_jobs.vision_shape import TowerShape, VisionShape, tower_shape, vision_shape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mmllm_core.connectors import Connector


_PROBED = 128


Read = Literal["attention_in", "attention_out", "feed_forward_in", "feed_forward_out"]
_READS: dict[str, Read] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "attention_in"),
    **dict.fromkeys(("o_proj", "dense"), "attention_out"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "fc1"), "feed_forward_in"),
    **dict.fromkeys(("down_proj", "fc2"), "feed_forward_out"),
}
"""By the names of linear layers in Llama, Phi-3 and phi-2."""


@dataclass(frozen=True)
class AdapterShape:
    """LoRA over the first layers, or all."""

    n_layers: int
    n_parameters: int
    per_layer_rank: int
    """Ranks of such a layer's adapted linear layers, added up."""
    per_layer_inputs: int
    """Widths of what they read, added up."""
    dropout: float
    reads: frozenset[Read] = frozenset(get_args(Read))
    """What of a layer they read, however many of them; all of it where a layer's name does not tell."""


@dataclass(frozen=True)
class ModelShape:
    """A multimodal LM as arithmetic sees it."""

    model_type: str
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_feed_forward: int
    vocabulary: int
    n_linear: int
    """Weights of the decoder's linear layers: what is quantized, and what multiplies each token."""
    n_kept: int
    """Embeddings, head, norms and biases, which keep their dtype; a tied head counts once."""
    largest_linear: int
    """Weights of the largest linear layer of the decoder."""
    quantization: Quantization
    dtype_bytes: int
    """Of a number that the LM computes with."""
    adapter: AdapterShape | None
    n_connector: int
    connector_bytes: float
    """Bytes that the connector keeps for its backward pass, for one image."""
    cross_attention_bytes: float
    """Bytes that blocks between the LM's layers keep for one position; 0 for connectors without such blocks."""
    image_positions: int
    """LM positions that an image takes."""
    n_features: int
    """Feature vectors of an image, which the connector reads."""
    trained: tuple[Part, ...] = ("connector", "lm")
    tower: TowerShape | None = None
    """CLIP's vision tower, where training runs it."""

    @property
    def n_trainable(self) -> int:
        """Parameters that are trained."""
        return self.n_trained_connector + self.n_trained_lm + self.n_trained_tower

    @property
    def n_trained_connector(self) -> int:
        """Of them, the connector's."""
        return self.n_connector if "connector" in self.trained else 0

    @property
    def n_trained_lm(self) -> int:
        """Of them, the adapter's, or the whole LM's where it has none."""
        if "lm" not in self.trained:
            return 0
        return self.adapter.n_parameters if self.adapter else self.n_linear + self.n_kept

    @property
    def n_trained_tower(self) -> int:
        """Of them, the vision tower's."""
        return self.tower.n_parameters if self.tower and "vision" in self.trained else 0

    @property
    def trains_whole_lm(self) -> bool:
        """Whether the LM's own weights are trained, not an adapter."""
        return "lm" in self.trained and self.adapter is None

    @property
    def n_parameters(self) -> int:
        """All parameters, whatever they are held in."""
        beside = self.n_connector + (self.adapter.n_parameters if self.adapter else 0)
        return self.n_linear + self.n_kept + beside + (self.tower.n_parameters if self.tower else 0)

    @property
    def work(self) -> ModelWork:
        """What a step over it costs."""
        tower = self.tower.n_parameters if self.tower else 0
        return ModelWork(
            n_frozen=0 if self.trains_whole_lm else self.n_linear,
            n_trained=self.n_linear if self.trains_whole_lm else self.n_trained_lm,
            n_connector=self.n_connector,
            connector_trained="connector" in self.trained,
            n_head=self.d_model * self.vocabulary,
            head_trained=self.trains_whole_lm,
            n_layers=self.n_layers,
            attention_width=self.n_heads * self.head_dim,
            n_vision=tower,
            vision_trained=self.n_trained_tower > 0,
        )


def model_shape(profile: Profile, recipe: Recipe, lm_config: Any) -> ModelShape:
    """Count the model that a recipe trains.

    Args:
        lm_config: of the LM, as transformers' `AutoConfig` gives it.

    Raises:
        ConfigError: the config is not one of a causal LM as Llama or Phi that can be trained, or the LM has no default
            LoRA targets and the recipe names none, or the targets fit no layer.
        WeightsError: CLIP's config cannot be had.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from mmllm_core.connectors import LmShape, build_connector

    wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if lacking := [name for name in wanted if not hasattr(lm_config, name)]:
        raise ConfigError(f"'{lm_config.model_type}': its config has no {lacking[0]}: such LMs cannot be planned")
    require_packable(lm_config.model_type)
    vision = vision_shape(profile.vision)
    with torch.device("meta"):
        try:
            lm = AutoModelForCausalLM.from_config(lm_config)
        except ValueError as error:
            raise ConfigError(f"'{lm_config.model_type}' is not a causal LM that transformers knows") from error
        connector = build_connector(profile.connector, vision.d_vision, LmShape.of(lm_config))
    linear = {
        name: module
        for name, module in lm.base_model.named_modules()
        if isinstance(module, nn.Linear) and module is not lm.get_output_embeddings()
    }
    n_linear = sum(module.weight.numel() for module in linear.values())
    n_heads = lm_config.num_attention_heads
    dtype = getattr(torch, profile.language.dtype)
    return ModelShape(
        model_type=lm_config.model_type,
        d_model=lm_config.hidden_size,
        n_layers=lm_config.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=getattr(lm_config, "num_key_value_heads", None) or n_heads,
        head_dim=getattr(lm_config, "head_dim", None) or lm_config.hidden_size // n_heads,
        d_feed_forward=lm_config.intermediate_size,
        vocabulary=lm_config.vocab_size,
        n_linear=n_linear,
        n_kept=sum(p.numel() for p in lm.parameters()) - n_linear,
        largest_linear=max(module.weight.numel() for module in linear.values()),
        quantization=profile.language.quantization,
        dtype_bytes=dtype.itemsize,
        adapter=_adapter_shape(recipe.lora, lm_config, linear) if recipe.lora else None,
        n_connector=sum(p.numel() for p in connector.parameters()),
        connector_bytes=_connector_bytes(connector, vision, dtype),
        cross_attention_bytes=_cross_attention_bytes(connector, dtype),
        image_positions=connector.n_tokens(vision.n_patches),
        n_features=vision.n_patches,
        trained=recipe.trained,
        tower=tower_shape(profile.vision, dtype) if recipe.features == "real_time" else None,
    )


def read_lm_config(profile: Profile, file: Path | None = None) -> Any:
    """The LM's config: from `file` if it is given, else from where the profile says; no weights are fetched from a hub.

    Raises:
        ConfigError: the file is no config of a causal LM that transformers knows.
        WeightsError: the profile's LM cannot be had; the message names `--lm-shape`.
    """
    from transformers import AutoConfig

    if file is None:
        try:
            folder = resolve(profile.language.source, weights=False)
        except WeightsError as error:
            raise WeightsError(f"{error}; or give the LM's config.json with --lm-shape") from error
    else:
        if not file.is_file():
            raise ConfigError(f"--lm-shape {file}: no such file: give the LM's config.json")
        folder = file
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        said = first_line(error)
        raise ConfigError(f"{folder}: not the config.json of a model that transformers knows: {said}") from error


def _adapter_shape(lora: LoraConfig, lm_config: Any, linear: "dict[str, nn.Linear]") -> AdapterShape:
    """Rank r beside a linear layer of n to m adds r (n + m) parameters: LoRA, arXiv:2106.09685, section 4.1."""
    from mmllm_core.language import lora_targets, n_adapted_layers

    targets, n_layers = lora_targets(lora, lm_config), n_adapted_layers(lora, lm_config)
    adapted = [
        module for name, module in linear.items() if name.rpartition(".")[2] in targets and _layer_of(name) < n_layers
    ]
    if not adapted:
        raise ConfigError(f"lora.target_modules: no linear layer of '{lm_config.model_type}' is called so")
    return AdapterShape(
        n_layers=n_layers,
        n_parameters=sum(lora.rank * (module.in_features + module.out_features) for module in adapted),
        per_layer_rank=lora.rank * len(adapted) // n_layers,
        per_layer_inputs=sum(module.in_features for module in adapted) // n_layers,
        dropout=lora.dropout,
        reads=frozenset(_READS[name] for name in targets) if set(targets) <= _READS.keys() else AdapterShape.reads,
    )


def _layer_of(name: str) -> int:
    """Of a module of the decoder, such as `layers.3.mlp.up_proj`."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


def _connector_bytes(connector: "Connector", vision: VisionShape, dtype: "torch.dtype") -> float:
    """What autograd keeps of one image on its way through the connector, without blocks between the LM's layers."""
    import torch

    features = torch.zeros(1, vision.n_patches, vision.d_vision, device="meta")  # (n_images, n, d_vision)
    weights = connector.to(dtype)
    return float(kept_bytes(lambda: weights(features), weights))


def _cross_attention_bytes(connector: "Connector", dtype: "torch.dtype") -> float:
    """What the blocks keep for one position, of a row of `_PROBED` positions that looks at one image."""
    import torch

    from mmllm_core.connectors import CrossAttentionConnector, Media

    if not (isinstance(connector, CrossAttentionConnector) and isinstance(connector.config, CrossAttentionConfig)):
        return 0.0
    d_model, n_queries = connector.d_model, connector.config.n_queries
    hidden = torch.zeros(1, _PROBED, d_model, dtype=dtype, device="meta", requires_grad=True)  # (b, t, d_model)
    media = Media(
        torch.zeros(1, n_queries, d_model, dtype=dtype, device="meta"),
        torch.zeros(1, _PROBED, dtype=torch.int64, device="meta"),
    )
    blocks = connector.blocks.to(dtype)
    return sum(kept_bytes(partial(block, hidden, media, name), block) for name, block in blocks.items()) / _PROBED
