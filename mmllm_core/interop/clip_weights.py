"""A Hugging Face CLIP vision tower -> open_clip's folder layout, which `mmllm_core.vision.ClipEncoder` reads.

In: a `CLIPVisionConfig`, the image processor's settings and the tower's tensors. Out: `open_clip_config.json` and
`open_clip_model.safetensors` with `visual.*` keys alone. Does not know where the tensors come from, nor the text
tower: an assistant never runs it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm_core.errors import WeightsError
from mmllm_core.vision import CLIP_CONFIG, CLIP_WEIGHTS

_WHOLE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",  # the misspelling is Hugging Face's own
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_INTERPOLATION = {2: "bilinear", 3: "bicubic"}
"""Pillow's resampling filters that open_clip offers."""


def write_open_clip(folder: Path, config: Any, processor: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a vision tower in open_clip's layout.

    Args:
        folder: existing folder to write into.
        config: the tower's `CLIPVisionConfig`.
        processor: the image processor's settings, as in `preprocessor_config.json`.
        tensors: the tower's tensors, named as in `CLIPVisionModel` without the `vision_model.` prefix.

    Raises:
        WeightsError: a tensor is missing, or an activation or preprocessing that open_clip does not have.
    """
    from safetensors.torch import save_file

    clip_config = {"model_cfg": _model_cfg(config), "preprocess_cfg": _preprocess_cfg(processor, config.image_size)}
    (folder / CLIP_CONFIG).write_text(json.dumps(clip_config, indent=2), encoding="utf-8")
    try:
        state = _to_open_clip(tensors, config.num_hidden_layers)
    except KeyError as error:
        raise WeightsError(f"the vision tower lacks the tensor {error}") from None
    # LLaVA drops CLIP's output projection, which features never pass through; the identity stands in for it.
    state["proj"] = torch.eye(config.hidden_size, dtype=state["conv1.weight"].dtype)
    save_file({f"visual.{name}": tensor.contiguous() for name, tensor in state.items()}, folder / CLIP_WEIGHTS)


def _to_open_clip(tensors: Mapping[str, Tensor], n_blocks: int) -> dict[str, Tensor]:
    state = {theirs: tensors[ours] for ours, theirs in _WHOLE.items()}
    for i in range(n_blocks):
        source, target = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [tensors[f"{source}self_attn.{which}_proj.{kind}"] for which in "qkv"]
            state[f"{target}attn.in_proj_{kind}"] = torch.cat(qkv)  # weight (3d, d), bias (3d,)
            for ours, theirs in _BLOCK.items():
                state[f"{target}{theirs}.{kind}"] = tensors[f"{source}{ours}.{kind}"]
    return state


def _model_cfg(config: Any) -> dict[str, Any]:
    if config.hidden_act not in ("gelu", "quick_gelu"):
        raise WeightsError(f"the vision tower's activation '{config.hidden_act}' is not gelu or quick_gelu")
    return {
        "embed_dim": config.hidden_size,
        "quick_gelu": config.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "head_width": config.hidden_size // config.num_attention_heads,
            "mlp_ratio": config.intermediate_size / config.hidden_size,
            "norm_kwargs": {"eps": config.layer_norm_eps},
        },
    }


def _preprocess_cfg(processor: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """open_clip's preprocessing that equals the processor's, or an error: other pixels would be other features."""
    if processor.get("do_pad"):
        raise WeightsError("the image processor pads images to squares, which open_clip's preprocessing does not do")
    scale = processor.get("rescale_factor", 1 / 255)
    if not (processor.get("do_normalize", True) and processor.get("do_rescale", True) and abs(255 * scale - 1) < 1e-3):
        raise WeightsError("the image processor does not scale pixels to 0..1 and then normalise them")
    resample = processor.get("resample", 3)
    if resample not in _INTERPOLATION:
        raise WeightsError(f"the image processor's resample filter {resample} is not bilinear (2) or bicubic (3)")
    size = _edges(processor.get("size") or image_size)
    crops = processor.get("do_center_crop", True)
    if crops and size == (None, image_size) and _edges(processor.get("crop_size") or image_size)[1] == image_size:
        resize_mode = "shortest"
    elif size == (image_size, image_size):
        resize_mode = "squash"
    else:
        raise WeightsError(
            f"the image processor's size {processor.get('size')} and crop {processor.get('crop_size')} do not give "
            f"the {image_size}x{image_size} pixels that the vision tower takes"
        )
    return {
        "size": image_size,
        "mean": list(processor["image_mean"]),
        "std": list(processor["image_std"]),
        "interpolation": _INTERPOLATION[resample],
        "resize_mode": resize_mode,
    }


def _edges(size: Any) -> tuple[int | None, int | None]:
    """(height, width), or (None, shortest edge): sizes are numbers in old files and mappings in newer ones."""
    if isinstance(size, int):
        return None, size
    if size.get("shortest_edge"):
        return None, size["shortest_edge"]
    return size.get("height"), size.get("width")
