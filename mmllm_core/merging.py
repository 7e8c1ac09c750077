"""A quantized base and its LoRA adapter -> one plain LM, and bundles that carry it.

In: an LM from `mmllm_core.language`, with or without an adapter. Out: the same LM with plain linear layers. The
adapter was trained on the base as quantization left it, so the base is dequantized first and the LoRA update is added
to that: merging into the weights from before quantization would give a model that was never trained. Layers are
replaced one at a time, so that memory grows to the merged LM and one layer more. Does not know images or the hub.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmllm_core.bundle import Bundle, MergedAdapter, save_bundle
from mmllm_core.config import Dtype, PathSource
from mmllm_core.errors import ExportError
from mmllm_core.vision import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARD = "2GB"


def merge_bundle(bundle: Bundle, name: str, *, dtype: Dtype | None = None, make_latest: bool = False) -> Bundle:
    """Make a bundle that carries the merged LM: it serves without dequantizing and without an adapter.

    Args:
        name: of the new bundle; its `BundleInfo.merged` records what was merged and how.
        dtype: of the merged LM; the bundle's own if not given.

    Raises:
        ExportError: the name is the bundle's own, or an adapter that cannot be merged.
    """
    if name == bundle.info.name:
        raise ExportError(f"bundle '{name}': a merged bundle needs a name of its own")
    model = bundle.load_model()
    lm, record = merge_language_model(bundle, model.lm, dtype)
    language = bundle.profile.language.model_copy(update={"quantization": "none", "dtype": record.dtype})
    profile = bundle.profile.model_copy(update={"language": language})
    vision = bundle.profile.vision.source
    return save_bundle(
        bundle.info.model_copy(update={"name": name, "profile": profile, "merged": record}),
        model.connector,
        bundle.tokenizer,
        vision_weights=bundle.weights(vision) if isinstance(vision, PathSource) else None,
        language_weights=lambda folder: write_language_model(lm, folder),
        make_latest=make_latest,
    )


def merge_language_model(
    bundle: Bundle, lm: nn.Module, dtype: Dtype | None = None
) -> tuple["PreTrainedModel", MergedAdapter]:
    """Merge the LM that `bundle.load_model` gave, in place, and say what was done.

    Raises:
        ExportError: an adapter that cannot be merged.
    """
    adapter = bundle.folder / "adapter" / "adapter_model.safetensors"
    dtype = dtype or bundle.profile.language.dtype
    if bundle.info.merged:  # there is nothing left to merge, and what was merged is still worth telling
        record = bundle.info.merged.model_copy(update={"dtype": dtype})
    else:
        record = MergedAdapter(
            bundle=bundle.info.name,
            adapter_sha256=file_sha256(adapter) if adapter.is_file() else None,
            quantization=bundle.profile.language.quantization,
            dtype=dtype,
        )
    return merge_adapter(lm, getattr(torch, record.dtype)), record


@torch.no_grad()
def merge_adapter(lm: Any, dtype: torch.dtype) -> "PreTrainedModel":
    """Turn an LM into one of plain layers, in place: dequantize, then add each LoRA update in float32.

    In float32 the logits stay within rounding of NF4 base and adapter; in bfloat16 each merged weight is rounded to 8
    significant bits. int8 also rounds activations, which a plain layer does not.

    Args:
        lm: a causal LM from `load_language_model`, plain or wrapped by peft; not usable afterwards.
        dtype: of every parameter of the result.

    Returns:
        The causal LM beneath peft, without a trace of peft or bitsandbytes.

    Raises:
        ExportError: an adapter that does more than add to linear layers.
    """
    from peft.tuners.lora import LoraLayer

    base: Any = lm.get_base_model() if hasattr(lm, "peft_config") else lm
    _check_mergeable(lm)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        base.set_submodule(name, _plain_linear(layer.get_base_layer(), _update(layer), dtype))
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            base.set_submodule(name, _plain_linear(module, None, dtype))
    for parameter in base.parameters():  # buffers keep their dtype: rotary frequencies need float32
        parameter.data = parameter.data.to(dtype)
    _forget_quantization(base)
    base.config.dtype = dtype
    return base.eval().requires_grad_(False)


def write_language_model(lm: "PreTrainedModel", folder: Path) -> None:
    """Write a plain LM as a Hugging Face causal LM's folder, without reference to remote code."""
    lm.config.__dict__.pop("auto_map", None)
    lm.save_pretrained(folder, max_shard_size=_SHARD)


def _check_mergeable(lm: Any) -> None:
    for name, config in getattr(lm, "peft_config", {}).items():
        where = f"adapter '{name}'"
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise ExportError(f"{where}: is {config.peft_type} and only LoRA can be merged")
        if config.modules_to_save or config.bias != "none" or config.use_dora or config.lora_bias:
            raise ExportError(
                f"{where}: changes more than linear weights (modules_to_save, bias, DoRA) and cannot be merged"
            )


def _update(layer: Any) -> Tensor:
    """What a LoRA layer adds to its base's weight, float32 (d_out, d_in)."""
    if not isinstance(layer.get_base_layer(), nn.Linear):
        raise ExportError(f"the adapter adapts a {type(layer.get_base_layer()).__name__}: only linear layers merge")
    update: Tensor = sum(layer.get_delta_weight(name).float() for name in layer.active_adapters)
    return update


def _plain_linear(module: Any, update: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    weight = _dequantized(module)  # (d_out, d_in)
    if update is not None:
        weight = weight.float() + update
    with torch.device("meta"):
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
    return plain


def _dequantized(module: Any) -> Tensor:
    """Weight of a linear layer (d_out, d_in) in the precision in which forwards see it."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    weight: Tensor
    if isinstance(module, Linear4bit):
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        return weight
    if isinstance(module, Linear8bitLt):
        scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
        weight = int8_vectorwise_dequant(module.weight.data, scales)
        return weight
    if type(module) is nn.Linear:
        return module.weight.data
    raise ExportError(f"a {type(module).__name__} holds weights in a way that cannot be merged")


def _forget_quantization(lm: Any) -> None:
    if (quantizer := getattr(lm, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(lm)
    for marker in ("is_loaded_in_4bit", "is_loaded_in_8bit", "_hf_peft_config_loaded"):
        lm.__dict__.pop(marker, None)
