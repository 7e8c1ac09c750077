"""CLIP vision towers: Hugging Face's `CLIPVisionModel` <-> open_clip's folder layout, which `ClipEncoder` reads.

In: a `CLIPVisionConfig`, the image processor's settings and the tower's tensors, or a folder with
`open_clip_config.json` and `open_clip_model.safetensors`. Out: the other of the two, with the same features. The
output projection is lost on the way, for features never pass through it. Does not know LLaVA, nor the text tower: an
assistant never runs it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm_core.errors import ExportError, WeightsError
from mmllm_core.vision import CLIP_CONFIG, CLIP_WEIGHTS, read_clip_config

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

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
_KEPT = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs"}
"""What `CLIPVisionConfig` can say of open_clip's `vision_cfg`."""
_NOT_IN_FEATURES = {
    "patch_dropout",  # training alone
    "pool_type",  # the rest: what becomes of features afterwards
    "final_ln_after_pool",
    "output_tokens",
    "attn_pooler_queries",
    "attn_pooler_heads",
}


@dataclass(frozen=True)
class HuggingFaceTower:
    """A vision tower as `CLIPVisionModel` has it."""

    config: "CLIPVisionConfig"
    tensors: dict[str, Tensor]
    """Named as in `CLIPVisionModel` without the `vision_model.` prefix, in the dtype that they are stored in."""
    processor: dict[str, Any]
    """Settings of a `CLIPImageProcessor`; its Pillow backend gives the pixels that open_clip gives."""


def read_open_clip(folder: Path) -> HuggingFaceTower:
    """Read a vision tower from open_clip's layout.

    Pixels differ where Pillow's and torchvision's centre crops do: by one column or row, in pictures whose longer
    side, once resized, is 3, 7, 11, ... pixels longer than the tower takes.

    Raises:
        WeightsError: files are missing or cannot be read.
        ExportError: a tower or preprocessing that `CLIPVisionModel` and its processor do not have.
    """
    from safetensors import SafetensorError, safe_open

    clip_config = read_clip_config(folder)
    config = _vision_config(clip_config["model_cfg"])
    path = folder / CLIP_WEIGHTS
    try:
        with safe_open(path, framework="pt") as stored:
            names = [name for name in stored.keys() if name.startswith("visual.")]  # noqa: SIM118, not a dict
            state = {name.removeprefix("visual."): stored.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read as safetensors: {error}") from error
    state.pop("proj", None)
    try:
        tensors = _to_hugging_face(state, config.num_hidden_layers)
    except KeyError as error:
        raise WeightsError(f"{path}: the vision tower lacks the tensor {error}") from None
    if state:
        raise ExportError(f"{path}: tensor 'visual.{min(state)}' has no place in a CLIPVisionModel")
    return HuggingFaceTower(config, tensors, _processor(clip_config.get("preprocess_cfg", {}), config.image_size))


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


def _to_hugging_face(state: dict[str, Tensor], n_blocks: int) -> dict[str, Tensor]:
    """Take a tower's tensors out of `state` under their Hugging Face names."""
    tensors = {ours: state.pop(theirs) for ours, theirs in _WHOLE.items()}
    for i in range(n_blocks):
        target, source = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            qkv = state.pop(f"{source}attn.in_proj_{kind}").chunk(3)  # weight (3d, d), bias (3d,)
            for which, tensor in zip("qkv", qkv, strict=True):
                tensors[f"{target}self_attn.{which}_proj.{kind}"] = tensor.clone()
            for ours, theirs in _BLOCK.items():
                tensors[f"{target}{ours}.{kind}"] = state.pop(f"{source}{theirs}.{kind}")
    return tensors


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


def _vision_config(model_cfg: Mapping[str, Any]) -> "CLIPVisionConfig":
    from open_clip import CLIPVisionCfg
    from transformers import CLIPVisionConfig

    given = model_cfg["vision_cfg"]
    usual = vars(CLIPVisionCfg())
    unusual = {key for key, value in given.items() if key not in _KEPT | _NOT_IN_FEATURES and value != usual.get(key)}
    if unusual:
        raise ExportError(f"the vision tower sets '{min(unusual)}', which a CLIPVisionModel does not have")
    cfg = usual | dict(given)
    norm = cfg["norm_kwargs"] or {}
    if not isinstance(cfg["layers"], int) or norm.keys() - {"eps"}:
        raise ExportError(
            "the vision tower is not CLIP's ViT: a CLIPVisionModel has one stack of blocks and plain norms"
        )
    return CLIPVisionConfig(
        hidden_size=cfg["width"],
        intermediate_size=int(cfg["width"] * cfg["mlp_ratio"]),
        num_hidden_layers=cfg["layers"],
        num_attention_heads=cfg["width"] // cfg["head_width"],
        image_size=_square(cfg["image_size"], "image"),
        patch_size=_square(cfg["patch_size"], "patch"),
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        layer_norm_eps=norm.get("eps", 1e-5),
        projection_dim=model_cfg["embed_dim"],
    )


def _processor(preprocess_cfg: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Settings of the image processor that equals open_clip's preprocessing."""
    from open_clip.transform import PreprocessCfg

    cfg = PreprocessCfg(**({"size": image_size} | dict(preprocess_cfg)))
    if _square(cfg.size, "preprocessed image") != image_size:
        raise ExportError(f"preprocessing gives {cfg.size} pixels and the vision tower takes {image_size}")
    resample = {name: filter_ for filter_, name in _INTERPOLATION.items()}
    if cfg.resize_mode not in ("shortest", "squash") or cfg.interpolation not in resample:
        raise ExportError(
            f"preprocessing resizes by '{cfg.resize_mode}' and '{cfg.interpolation}', which CLIP's image processor "
            "does not have"
        )
    crops = cfg.resize_mode == "shortest"
    square = {"height": image_size, "width": image_size}
    return {
        "size": {"shortest_edge": image_size} if crops else square,
        "do_center_crop": crops,
        "crop_size": square,
        "resample": resample[cfg.interpolation],
        "image_mean": list(cfg.mean),
        "image_std": list(cfg.std),
    }


def _square(size: Any, what: str) -> int:
    edges = {size} if isinstance(size, int) else set(size)
    if len(edges) != 1:
        raise ExportError(f"the {what} is {size} pixels and CLIP's are square")
    return int(edges.pop())


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
