"""Phi and other Hugging Face causal LMs: loading, NF4 or int8, LoRA, the tokenizer and its chat template.

In: a folder with safetensors weights and a tokenizer. Out: a frozen LM, optionally quantized and with a
LoRA adapter. Does not know images; embeddings reach the LM through `inputs_embeds`.
"""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmllm_core.config import Dtype, LanguageConfig, LoraConfig, Quantization
from mmllm_core.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
}
"""Linear layers that LoRA adapts, by `model_type`: all of a block's, as QLoRA advises (arXiv:2305.14314)."""

PHI2_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Instruct: ' + m.content + '\\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Output: ' + m.content + eos_token + '\\n' }}"
    "{% else %}{{ m.content + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Output: ' }}{% endif %}"
)
"""The instruct format of phi-2's model card, for tokenizers that carry no chat template."""


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer; one without a chat template gets phi-2's.

    Raises:
        WeightsError: the folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}: holds no tokenizer that can be loaded: {error}") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PHI2_CHAT_TEMPLATE
    return tokenizer


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it (AVX-512 and later, or Arm's)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype(dtype: Dtype, device: "torch.device | str") -> Dtype:
    """What an LM is computed in: `dtype`, but float32 instead of bfloat16 on a CPU that has no instructions for that.

    There PyTorch multiplies bfloat16 matrices one number at a time, some 40 times slower than float32 ones.
    """
    if dtype == "bfloat16" and torch.device(device).type == "cpu" and not multiplies_bfloat16():
        return "float32"
    return dtype


def load_language_model(config: LanguageConfig, folder: Path, device: str = "cpu") -> "PreTrainedModel":
    """Load a frozen causal LM in eval mode, quantized as the config says.

    NF4 follows QLoRA: double quantization, stored as if it were of the dtype that it is computed in, so that ZeRO can
    shard it. int8 is LLM.int8(), whose products are computed in float16 whatever `dtype` says. The LM's head and
    embeddings have `compute_dtype`.

    Raises:
        WeightsError: the folder holds no weights that fit.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, compute_dtype(config.dtype, device))
    try:
        lm, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=_quantization_config(config.quantization, dtype),
            device_map={"": device},
            attn_implementation="eager"
            if device == "cpu"
            else "sdpa",  # with a mask, as decoding has, eager wins on CPU
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder}: holds no causal LM that can be loaded: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise WeightsError(f"{folder}: its weights have other shapes than its config.json says") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would go on with random ones
        raise WeightsError(f"{folder}: its weights lack {len(missing)} tensors, such as '{missing[0]}'")
    _disable_cpu_repacking(lm)
    return lm.eval().requires_grad_(False)


def load_embeddings(config: LanguageConfig, folder: Path, device: str = "cpu") -> "PreTrainedModel":
    """Load a causal LM without its layers, whatever they are quantized by: it can embed tokens and nothing else.

    Raises:
        WeightsError: the folder holds no weights that fit.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        lm_config = AutoConfig.from_pretrained(folder, local_files_only=True)
        lm_config.num_hidden_layers = 0
        if getattr(lm_config, "layer_types", None):
            lm_config.layer_types = []
        vars(lm_config).pop("quantization_config", None)
        lm = AutoModelForCausalLM.from_pretrained(
            folder,
            config=lm_config,
            dtype=getattr(torch, compute_dtype(config.dtype, device)),
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder}: holds no causal LM that can be loaded: {error}") from error
    return lm.to(device).eval().requires_grad_(False)


def unfreeze(lm: "PreTrainedModel") -> None:
    """Make every weight of an LM trainable, in the dtype that it has: full fine-tuning.

    Raises:
        ConfigError: the LM is quantized, or has an adapter.
    """
    if getattr(lm, "peft_config", None):
        raise ConfigError("an LM with an adapter is trained through that: leave 'lora' out to train all of it")
    if getattr(lm, "is_quantized", False):
        raise ConfigError("quantized weights cannot be trained: give 'lora', or a profile with quantization none")
    lm.requires_grad_(True)


def stop_token_ids(lm: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that end an answer: the model's end-of-sequence ids and the tokenizer's end-of-turn token."""
    configured = lm.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    ids |= {
        tokenizer.eos_token_id,
        *(tokenizer.convert_tokens_to_ids(t) for t in ("<|end|>", "<|im_end|>", "<|eot_id|>")),
    }
    return sorted(token for token in ids if token is not None and token != tokenizer.unk_token_id)


def lora_targets(config: LoraConfig, lm_config: Any) -> tuple[str, ...]:
    """Names of the linear layers that LoRA adapts.

    Raises:
        ConfigError: the architecture is not in `LORA_TARGETS` and the config names no target modules.
    """
    targets = config.target_modules or LORA_TARGETS.get(lm_config.model_type)
    if targets is None:
        known = ", ".join(sorted(LORA_TARGETS))
        raise ConfigError(
            f"lora.target_modules: give them, for '{lm_config.model_type}' has no default (known: {known})"
        )
    return targets


def n_adapted_layers(config: LoraConfig, lm_config: Any) -> int:
    """How many of the LM's layers LoRA adapts, counted from the first.

    Raises:
        ConfigError: the config asks for more than there are.
    """
    n_layers = int(lm_config.num_hidden_layers)
    if config.layers is not None and config.layers > n_layers:
        raise ConfigError(f"lora.layers: {config.layers} and the LM has only {n_layers} layers: lower it")
    return config.layers or n_layers


def add_adapter(lm: "PreTrainedModel", config: LoraConfig) -> nn.Module:
    """Wrap the LM with a fresh, trainable LoRA adapter (a `peft.PeftModel`).

    Raises:
        ConfigError: as `lora_targets` and `n_adapted_layers`.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    n_adapted = n_adapted_layers(config, lm.config)
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(lora_targets(config, lm.config)),
        layers_to_transform=list(range(n_adapted)) if config.layers else None,
        task_type="CAUSAL_LM",
    )
    adapted: nn.Module = get_peft_model(lm, peft_config)
    return adapted


@torch.no_grad()
def interpolate_adapter(weights: Mapping[str, Tensor], share: float) -> None:
    """Take a LoRA adapter part of the way from the untuned LM to the tuned one, in place (`LoraConfig.interpolation`).

    What an adapter adds to a layer, B A x, is linear in B.

    Args:
        weights: of an adapter, or of a model with one, by peft's names; others stay as they are.
    """
    for name, weight in weights.items():
        if ".lora_B." in name:
            weight.mul_(share)


def load_adapter(lm: "PreTrainedModel", folder: Path, *, trainable: bool = False) -> nn.Module:
    """Wrap the LM with a saved adapter, in eval mode; frozen unless it is to be trained further."""
    from peft import PeftModel

    adapted: nn.Module = PeftModel.from_pretrained(lm, folder, is_trainable=trainable).eval()
    return adapted


def _quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "nf4":
        # It would advise to install kernels that are fetched from the hub and run as code.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        )
    if quantization == "int8":
        # It would say at every layer of every forward that activations become float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def _disable_cpu_repacking(lm: nn.Module) -> None:
    """Keep bitsandbytes from repacking NF4 weights in place after an eval-mode forward on AVX512-BF16 CPUs.

    The repacked weights no longer dequantize to what they were, so training after an evaluation would
    silently run on a corrupted base.
    """
    from bitsandbytes.nn import Linear4bit

    for module in lm.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
