"""CLIP's vision tower as a module that can be trained: pixels -> features.

In: pixels (n_images, 3, h, w) as `ClipEncoder.preprocess` makes them. Out: features (n_images, n_patches, d_vision) in
the tower's own dtype, never rounded for storage. Weights are read from and written to open_clip's folder layout. Does
not know images, keys or the connector.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm_core.config import VisionConfig
from mmllm_core.errors import WeightsError
from mmllm_core.vision import CLIP_CONFIG, CLIP_WEIGHTS, n_features, read_clip_config

_PREFIX = "visual."
"""Of the vision tower's keys in open_clip's layout; they are the keys of a `VisionTower` too."""

TEXT_TOWER_IS_STALE = {"mmllm.text_tower": "stale"}
"""In the metadata of weights whose vision tower was trained on without the text tower beside it."""


class VisionTower(nn.Module):
    """One layer's output of a CLIP vision tower, its patches merged and CLS kept as the config says.

    Args:
        visual: open_clip's vision tower.
        config: which layer and tokens become features.

    Raises:
        WeightsError: the tower has fewer blocks than `feature_layer` counts back.
    """

    def __init__(self, visual: Any, config: VisionConfig):
        super().__init__()
        self.visual = visual
        self.config = config
        self._block = len(visual.transformer.resblocks) + config.feature_layer
        if self._block < 0:
            raise WeightsError(
                f"feature_layer {config.feature_layer}: the vision tower has only "
                f"{len(visual.transformer.resblocks)} blocks"
            )
        visual.patch_dropout = nn.Identity()  # features are of all patches, in training too

    @property
    def n_patches(self) -> int:
        """Features an image gives, CLS included where it is kept."""
        return n_features(self.visual.grid_size, self.config)

    @property
    def n_tokens(self) -> int:
        """Tokens that its blocks compute with: every patch, and CLS."""
        rows, columns = self.visual.grid_size
        return int(rows * columns) + 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the features."""
        return next(self.parameters()).dtype  # to look a weight up by name makes ZeRO-3 gather it

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (n_images, n_patches, d_vision) of pixels (n_images, 3, h, w)."""
        found = self.visual.forward_intermediates(
            pixels.to(self.dtype),
            indices=[self._block],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NCHW",
            output_extra_tokens=True,
        )
        patches = found["image_intermediates"][0]  # (b, d_vision, rows, columns)
        if self.config.merge > 1:
            patches = nn.functional.avg_pool2d(patches, self.config.merge)
        tokens: Tensor = patches.flatten(2).transpose(1, 2)  # (b, n, d_vision)
        if self.config.cls_token:
            tokens = torch.cat([found["image_intermediates_prefix"][0], tokens], dim=1)
        return tokens

    def blank(self, device: torch.device) -> Tensor:
        """Pixels (1, 3, h, w) of an image that shows nothing."""
        return torch.zeros(1, 3, *self.visual.image_size, device=device)

    def unfreeze(self) -> None:
        """Make trainable what features depend on: not the blocks after the feature layer, nor CLIP's projection."""
        self.requires_grad_(True)
        parameters = list(self.parameters())
        with torch.enable_grad():
            shown = self(self.blank(parameters[0].device)).float().sum()
        for parameter, grad in zip(parameters, torch.autograd.grad(shown, parameters, allow_unused=True), strict=True):
            parameter.requires_grad_(grad is not None)

    def checkpoint_gradients(self) -> None:
        """Compute blocks' activations again in the backward pass instead of keeping them."""
        self.visual.set_grad_checkpointing(True)


def load_vision_tower(config: VisionConfig, weights: Path) -> VisionTower:
    """Build the vision tower alone, frozen and in float32: answers never need CLIP's text tower.

    Args:
        weights: folder in open_clip's layout; only keys under `visual.` are read.

    Raises:
        WeightsError: files are missing, or do not fit the architecture or the layer that configs name.
    """
    with _without_transformers():
        from open_clip.model import _build_vision_tower
    from safetensors import SafetensorError, safe_open

    model_cfg = read_clip_config(weights)["model_cfg"]
    visual = _build_vision_tower(model_cfg["embed_dim"], model_cfg["vision_cfg"], model_cfg.get("quick_gelu", False))
    path = weights / CLIP_WEIGHTS
    try:
        with safe_open(path, framework="pt") as stored:
            keys = [key for key in stored.keys() if key.startswith(_PREFIX)]  # noqa: SIM118, not a dict
            state = {key.removeprefix(_PREFIX): stored.get_tensor(key) for key in keys}
        visual.load_state_dict(state)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{path}: does not fit the architecture in {CLIP_CONFIG}: {error}") from error
    return VisionTower(visual.float().eval().requires_grad_(False), config)


@contextmanager
def _without_transformers() -> Iterator[None]:
    """Import open_clip as where transformers is not installed, unless it is loaded already.

    open_clip has it for text towers of Hugging Face, which are not used here (`has_text_tower`), and it takes a third
    of the time in which a replica of CLIP starts.
    """
    if "transformers" in sys.modules:
        yield
        return
    sys.modules["transformers"] = None  # type: ignore[assignment]  # so that an import of it fails
    try:
        yield
    finally:
        del sys.modules["transformers"]


def save_vision(tower: VisionTower, source: Path, folder: Path) -> None:
    """Write a trained tower in open_clip's layout: the source's files, with the vision tower's weights in their place.

    Weights keep the dtypes that the source has, and CLIP's other parts stay as they were. Its text tower no longer
    belongs to what the vision tower became, which the file says of itself (`TEXT_TOWER_IS_STALE`).

    Args:
        source: folder that the tower was loaded from.
        folder: to write to; it is made if need be.

    Raises:
        WeightsError: the source holds another architecture.
    """
    from safetensors.torch import load_file, save_file

    state = load_file(source / CLIP_WEIGHTS)
    trained = tower.state_dict()
    shapes = {key: tensor.shape for key, tensor in trained.items()}
    if shapes != {key: tensor.shape for key, tensor in state.items() if key.startswith(_PREFIX)}:
        raise WeightsError(f"{source / CLIP_WEIGHTS}: holds another vision tower than the one that was trained from it")
    state |= {key: tensor.detach().to("cpu", state[key].dtype).contiguous() for key, tensor in trained.items()}
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / CLIP_CONFIG, folder / CLIP_CONFIG)
    save_file(state, folder / CLIP_WEIGHTS, metadata={"format": "pt"} | TEXT_TOWER_IS_STALE)
