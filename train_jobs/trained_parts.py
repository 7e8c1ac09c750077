"""A checkpoint -> a bundle: trained weights beside those that stayed as they were.

In: a checkpoint's folder (`train_jobs.checkpoint`) and the run's origins. Out: a bundle. Trained weights are rounded to
the dtype that the model computed with, so that the bundle answers as the model did. Does not know Ray or DeepSpeed.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from mmllm_core.bundle import Bundle, BundleInfo, save_bundle
from mmllm_core.config import Dtype, HubSource, PackageSource, Profile, Recipe
from mmllm_core.errors import TrainingError
from mmllm_core.vision import ClipEncoder
from train_jobs.checkpoint import ADAPTER_CONFIG, load_weights_alone
from train_jobs.origins import Origins, starting_connector

if TYPE_CHECKING:
    from torch import Tensor

    from mmllm_core.connectors import Connector


@dataclass(frozen=True)
class RunOutcome:
    """What a bundle records of the run that made it."""

    recipe: Recipe
    profile: Profile
    origins: Origins
    data: dict[str, str]
    metrics: dict[str, Any]
    dtype: Dtype
    """That the model computed with."""


def bundle_of(checkpoint: Path, outcome: RunOutcome) -> Bundle:
    """Write the bundle of a finished run; it is called as the recipe.

    Raises:
        TrainingError: the checkpoint is not whole.
    """
    import torch

    from mmllm_core.language import interpolate_adapter, load_tokenizer

    recipe, profile, origins = outcome.recipe, outcome.profile, outcome.origins
    dtype = getattr(torch, outcome.dtype)
    trained = {name: weight.to(dtype) for name, weight in load_weights_alone(checkpoint).items()}
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        adapter, language = origins.adapter, _carried(origins.language, origins)
        if lm_weights := _part(trained, "lm."):
            if (checkpoint / ADAPTER_CONFIG).is_file():
                if recipe.lora:
                    interpolate_adapter(lm_weights, recipe.lora.interpolation)
                adapter = _write_adapter(checkpoint, lm_weights, scratch / "adapter")
            else:
                language = _write_lm(profile, origins, lm_weights, scratch / "language")
        vision, fingerprint = _vision(profile, origins, _part(trained, "vision."), scratch / "vision")
        info = BundleInfo(
            name=recipe.name,
            profile=profile,
            d_vision=origins.d_vision,
            n_patches=origins.n_patches,
            feature_fingerprint=fingerprint,
            recipe=recipe.model_dump(mode="json"),
            data=outcome.data,
            metrics=outcome.metrics,
        )
        return save_bundle(
            info,
            _connector(recipe, profile, origins, _part(trained, "connector.")),
            load_tokenizer(origins.language),
            adapter=adapter,
            vision_weights=vision,
            language_weights=language,
        )


def _part(trained: "dict[str, Tensor]", prefix: str) -> "dict[str, Tensor]":
    return {name.removeprefix(prefix): weight for name, weight in trained.items() if name.startswith(prefix)}


def _carried(folder: Path, origins: Origins) -> Path | None:
    """Weights that the bundle of before carried are carried on."""
    return folder if origins.bundle and folder.is_relative_to(origins.bundle) else None


def _connector(recipe: Recipe, profile: Profile, origins: Origins, weights: "dict[str, Tensor]") -> "Connector":
    """The trained connector in float32, or the one that the run started with."""
    import torch

    from mmllm_core.connectors import LmShape, build_connector
    from mmllm_core.language import load_language_model

    if not weights and origins.bundle:
        weights = load_file(origins.bundle / "connector.safetensors")
    if not weights:
        torch.manual_seed(recipe.seed)
        return starting_connector(profile, origins, load_language_model(profile.language, origins.language))
    connector = build_connector(profile.connector, origins.d_vision, LmShape.read(origins.language))
    connector.load_state_dict(weights)
    return connector


def _write_adapter(checkpoint: Path, weights: "dict[str, Tensor]", folder: Path) -> Path:
    """An adapter in peft's own format, whose keys leave out the adapter's name."""
    folder.mkdir()
    shutil.copyfile(checkpoint / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    named = {name.replace(".default.", "."): weight.float().contiguous() for name, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _write_lm(profile: Profile, origins: Origins, weights: "dict[str, Tensor]", folder: Path) -> Path:
    """The LM with trained weights in the place of those it started with."""
    from mmllm_core.language import load_language_model, load_tokenizer

    lm: Any = load_language_model(profile.language, origins.language)
    strange = set(lm.load_state_dict(weights, strict=False).unexpected_keys)
    if strange:
        raise TrainingError(f"the checkpoint holds '{min(strange)}', which the LM does not have")
    lm.save_pretrained(folder)
    load_tokenizer(origins.language).save_pretrained(folder)
    return folder


def _vision(profile: Profile, origins: Origins, weights: "dict[str, Tensor]", folder: Path) -> tuple[Path | None, str]:
    """CLIP's folder, where the bundle must carry it, and the encoder's fingerprint."""
    from mmllm_core.vision_tower import load_vision_tower, save_vision

    if not weights:
        elsewhere = isinstance(profile.vision.source, HubSource | PackageSource)
        return (None if elsewhere else origins.vision), origins.fingerprint
    tower = load_vision_tower(profile.vision, origins.vision)
    tower.load_state_dict(weights, strict=False)  # blocks after the feature layer are not trained
    save_vision(tower, origins.vision, folder)
    return folder, ClipEncoder(profile.vision, folder).fingerprint
