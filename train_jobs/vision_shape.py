"""What of CLIP decides memory and time: features of an image, and the vision tower, from configs alone.

In: a profile's `VisionConfig`. Out: a `VisionShape`, a `TowerShape`. Weights need not even exist yet.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmllm_core.config import ClipRecipe, HubSource, TrainedSource, VisionConfig
from mmllm_core.models.resolve import resolve
from mmllm_core.vision import n_features, read_clip_config
from train_jobs.kept_bytes import kept_bytes
from train_jobs.recipe import load_recipe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VisionShape:
    """What CLIP gives of an image: `n_patches` features of width `d_vision`."""

    d_vision: int
    n_patches: int


def vision_shape(vision: VisionConfig) -> VisionShape:
    """Shape of an image's features by CLIP's architecture; its weights need not even exist yet.

    Raises:
        WeightsError: the architecture cannot be had.
    """
    tower = _clip_architecture(vision)["vision_cfg"]
    side = int(tower["image_size"]) // int(tower["patch_size"])
    return VisionShape(int(tower["width"]), n_features((side, side), vision))


@dataclass(frozen=True)
class TowerShape:
    """CLIP's vision tower."""

    n_parameters: int
    n_patches: int
    """Tokens of an image in it, CLS included."""
    kept_bytes: float
    """What autograd keeps of one image, if the tower is trained."""


def tower_shape(vision: VisionConfig, dtype: "torch.dtype") -> TowerShape:
    """Count the vision tower, built without numbers.

    Raises:
        WeightsError: the architecture cannot be had.
    """
    import torch
    from open_clip.model import _build_vision_tower

    architecture = _clip_architecture(vision)
    config = architecture["vision_cfg"]
    with torch.device("meta"):
        tower = _build_vision_tower(architecture["embed_dim"], config, architecture.get("quick_gelu", False))
        tower = tower.to(dtype).train()
        pixels = torch.zeros(1, 3, config["image_size"], config["image_size"], dtype=dtype)  # (1, 3, h, w)
    side = int(config["image_size"]) // int(config["patch_size"])
    kept = kept_bytes(lambda: tower(pixels), tower)
    return TowerShape(sum(p.numel() for p in tower.parameters()), side * side + 1, float(kept))


def _clip_architecture(vision: VisionConfig) -> dict[str, Any]:
    """open_clip's model config; of hub weights that open_clip lists itself, from its own list."""
    if isinstance(vision.source, TrainedSource):
        recipe = load_recipe(vision.source.recipe)
        assert isinstance(recipe, ClipRecipe)
        return recipe.architecture
    if isinstance(vision.source, HubSource) and (listed := _listed_by_open_clip(vision.source.repo)):
        return listed
    return dict(read_clip_config(resolve(vision.source, weights=False))["model_cfg"])


def _listed_by_open_clip(repo: str) -> dict[str, Any] | None:
    import open_clip

    for architecture, tag in open_clip.list_pretrained():
        listed = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub") or ""
        if listed.rstrip("/") == repo:
            return dict(open_clip.get_model_config(architecture))
    return None
