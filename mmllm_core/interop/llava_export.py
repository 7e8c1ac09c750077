"""Bundles -> LLaVA checkpoints in Hugging Face format, which plain transformers opens.

In: a bundle of a CLIP ViT, a connector of two linear layers and a Llama or Phi-3 LM. Out: the folder of a
`LlavaForConditionalGeneration` and its processor, with the bundle's logits. The LM is quantized and adapted no more:
see `mmllm_core.merging`. Does not know model cards or the hub.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm_core.bundle import Bundle, MergedAdapter
from mmllm_core.config import Dtype, MlpConfig
from mmllm_core.errors import ExportError
from mmllm_core.interop.clip_weights import HuggingFaceTower, read_open_clip
from mmllm_core.interop.llava_checkpoint import LANGUAGE_TYPES
from mmllm_core.interop.llava_processor import build_processor
from mmllm_core.interop.shards import write_shards
from mmllm_core.language import load_tokenizer, stop_token_ids
from mmllm_core.merging import merge_language_model

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor, PreTrainedModel

_CONNECTOR = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}


def write_llava(bundle: Bundle, folder: Path, *, dtype: Dtype | None = None, exact_ids: bool = True) -> MergedAdapter:
    """Write a bundle as a LLaVA checkpoint; what cannot be written is refused before the LM loads.

    Logits over the LM's own vocabulary are the bundle's. Where the LM has no spare row for `<image>`, one is added
    to its embeddings, whose logit is the mean of all and so never the highest.

    Args:
        folder: existing folder to write into.
        dtype: of the LM, and the one that transformers opens the checkpoint in; the bundle's own if not given.
        exact_ids: whether to refuse a chat template that a processor tokenizes otherwise than our renderer.

    Returns:
        How the LM was merged.

    Raises:
        ExportError: something that LLaVA cannot express, by name.
    """
    _check_expressible(bundle)
    vision = bundle.profile.vision
    tower = read_open_clip(bundle.weights(vision.source))
    tokenizer = load_tokenizer(bundle.folder / "tokenizer")
    processor = build_processor(tokenizer, tower, cls_token=vision.cls_token, exact_ids=exact_ids)

    model = bundle.load_model()
    connector = {name: tensor.cpu() for name, tensor in model.connector.state_dict().items()}
    lm, record = merge_language_model(bundle, model.lm, dtype)
    config = _llava_config(bundle, tower, lm, processor, bias="linear_1.bias" in connector)
    config.save_pretrained(folder)
    _write_generation_config(lm, bundle, folder)
    processor.save_pretrained(folder)
    write_shards(folder, _tensors(tower, connector, lm, config.text_config.vocab_size))
    return record


def _check_expressible(bundle: Bundle) -> None:
    """Refuse what a LLaVA checkpoint has no place for."""
    from transformers import AutoConfig

    name, profile = bundle.info.name, bundle.profile
    connector = profile.connector
    if not isinstance(connector, MlpConfig):
        raise ExportError(f"bundle '{name}': its connector is '{connector.kind}' and LLaVA's is an mlp")
    if connector.input_norm:
        raise ExportError(
            f"bundle '{name}': its connector normalises features (input_norm), which depends on each feature and so "
            "cannot be folded into the linear layers that LLaVA has: train with 'connector.input_norm: false'"
        )
    if profile.vision.merge > 1:
        raise ExportError(
            f"bundle '{name}': averages squares of {profile.vision.merge}x{profile.vision.merge} patches (merge) and "
            "LLaVA keeps every patch: train with 'vision.merge: 1'"
        )
    language = AutoConfig.from_pretrained(bundle.weights(profile.language.source), local_files_only=True)
    if language.model_type == "phi":
        raise ExportError(f"bundle '{name}': its LM is phi-2, whose head has a bias, and LLaVA's has none")
    if language.model_type not in LANGUAGE_TYPES:
        known = " and ".join(LANGUAGE_TYPES)
        raise ExportError(f"bundle '{name}': its LM is '{language.model_type}' and only {known} can be exported")


def _llava_config(
    bundle: Bundle, tower: HuggingFaceTower, lm: "PreTrainedModel", processor: "LlavaProcessor", *, bias: bool
) -> "LlavaConfig":
    from transformers import LlavaConfig

    text = lm.config.to_dict()
    for key in ("auto_map", "quantization_config", "_name_or_path"):
        text.pop(key, None)
    text["vocab_size"] = max(text["vocab_size"], processor.image_token_id + 1)
    vision = bundle.profile.vision
    return LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=bundle.info.n_patches,
        projector_hidden_act="gelu",
        multimodal_projector_bias=bias,
        vision_feature_layer=vision.feature_layer,
        vision_feature_select_strategy="full" if vision.cls_token else "default",
        tie_word_embeddings=bool(text["tie_word_embeddings"]),
        dtype=lm.config.dtype,
        architectures=["LlavaForConditionalGeneration"],
    )


def _write_generation_config(lm: Any, bundle: Bundle, folder: Path) -> None:
    """Answers end where our engine ends them."""
    stop_ids = stop_token_ids(lm, bundle.tokenizer)
    lm.generation_config.eos_token_id = stop_ids
    if lm.generation_config.pad_token_id is None:
        lm.generation_config.pad_token_id = stop_ids[0]
    lm.generation_config.save_pretrained(folder)


def _tensors(
    tower: HuggingFaceTower, connector: dict[str, Tensor], lm: "PreTrainedModel", vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, named as the checkpoints on the hub."""
    for name, tensor in tower.tensors.items():
        yield f"vision_tower.vision_model.{name}", tensor
    if unknown := connector.keys() - _CONNECTOR:
        raise ExportError(f"the connector's '{min(unknown)}' has no place in LLaVA's projector")
    for name, tensor in connector.items():
        yield f"multi_modal_projector.{name}", tensor
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    for name, tensor in lm.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensor = _with_rows(tensor, vocab_size)
        yield f"language_model.{name}", tensor.cpu()


def _with_rows(weight: Tensor, n_rows: int) -> Tensor:
    """Embeddings (n, d) with further rows, each the mean of all: a mean of logits is never above the highest."""
    missing = n_rows - weight.shape[0]
    if missing <= 0:
        return weight
    mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)  # (1, d)
    return torch.cat([weight, mean.expand(missing, -1)])  # (n_rows, d)
