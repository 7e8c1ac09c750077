"""Where the weights that a run starts from lie, and the model that is built of them.

In: a profile, or the bundle that a recipe goes on from. Out: `Origins`, found once by the driver; and of them, in each
worker, the model with exactly the parts trainable that the recipe trains. Does not know data, DeepSpeed or checkpoints.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm_core.bundle import Bundle, bundles_folder
from mmllm_core.config import Profile, Recipe
from mmllm_core.errors import ConfigError, WeightsError, first_line
from mmllm_core.models.resolve import resolve
from mmllm_core.packed_attention import require_packable
from mmllm_core.vision import ClipEncoder
from train_jobs.recipe import recipe_profile

if TYPE_CHECKING:
    from mmllm_core.connectors import Connector
    from mmllm_core.model import MultimodalLM


@dataclass(frozen=True)
class Origins:
    """Folders, and what a connector has to know of CLIP."""

    language: Path
    vision: Path
    fingerprint: str
    """Of the encoder as it was before training."""
    d_vision: int
    n_patches: int
    bundle: Path | None = None
    """The bundle whose connector and adapter are trained further."""

    @property
    def adapter(self) -> Path | None:
        """The adapter that is there already."""
        folder = self.bundle / "adapter" if self.bundle else None
        return folder if folder and folder.is_dir() else None


def find_origins(recipe: Recipe, profile: Profile) -> Origins:
    """Bring the weights to this machine and look at CLIP's.

    Raises:
        WeightsError: weights that the profile names cannot be had.
        BundleError: there is no such bundle, or it is damaged.
        ConfigError: the LM cannot be trained on packed conversations, or the bundle has an adapter of another shape
            than the recipe would train.
    """
    if recipe.from_bundle is None:
        language = resolve(profile.language.source)
        require_packable(_model_type(language))
        vision = starting_vision(recipe, profile)
        encoder = ClipEncoder(profile.vision, vision)
        return Origins(language, vision, encoder.fingerprint, encoder.d_vision, encoder.n_patches)
    bundle = Bundle.open(bundles_folder() / recipe.from_bundle)
    origins = Origins(
        language=bundle.weights(bundle.profile.language.source),
        vision=bundle.weights(bundle.profile.vision.source),
        fingerprint=bundle.info.feature_fingerprint,
        d_vision=bundle.info.d_vision,
        n_patches=bundle.info.n_patches,
        bundle=bundle.folder,
    )
    require_packable(_model_type(origins.language))
    if origins.adapter and "lm" in recipe.trained:
        _require_equal_adapter(origins.adapter, recipe)
    return origins


def starting_vision(recipe: Recipe, profile: Profile) -> Path:
    """CLIP's folder: the profile's, or that of the bundle which the run goes on from.

    Raises:
        WeightsError: weights that the profile names cannot be had.
        BundleError: there is no such bundle, or it is damaged.
    """
    if recipe.from_bundle is None:
        return resolve(profile.vision.source)
    return Bundle.open(bundles_folder() / recipe.from_bundle).weights(profile.vision.source)


def starting_profile(recipe: Recipe) -> Profile:
    """The profile that a run trains with: the recipe's, or that of the bundle which it goes on from.

    Raises:
        ConfigError: the profile is unknown, or the bundle was made with another.
        BundleError: there is no such bundle, or it is damaged.
    """
    profile = recipe_profile(recipe)
    if recipe.from_bundle is None:
        return profile
    found = Bundle.open(bundles_folder() / recipe.from_bundle).profile
    if found.name != profile.name:
        raise ConfigError(
            f"from_bundle: '{recipe.from_bundle}' was made with profile '{found.name}', and the recipe names "
            f"'{profile.name}': name the same"
        )
    return found


def build_model(
    recipe: Recipe, profile: Profile, origins: Origins, device: str, encoder: ClipEncoder | None = None
) -> "MultimodalLM":
    """Build the model in training mode, the same on every worker.

    Args:
        encoder: whose tower the model runs, where features are computed as training goes.

    Raises:
        WeightsError: files do not fit the profile.
        ConfigError: the LM's architecture lacks what the recipe asks for.
    """
    import torch

    from mmllm_core.language import add_adapter, compute_dtype, load_adapter, load_language_model, unfreeze
    from mmllm_core.model import MultimodalLM

    torch.manual_seed(recipe.seed)
    lm: Any = load_language_model(profile.language, origins.language, device)
    connector = starting_connector(profile, origins, lm)
    if origins.adapter:
        lm = load_adapter(lm, origins.adapter, trainable="lm" in recipe.trained)
    elif "lm" in recipe.trained and recipe.lora:
        lm = add_adapter(lm, recipe.lora)
    elif "lm" in recipe.trained:
        unfreeze(lm)
    tower = encoder.tower if encoder else None
    if tower and "vision" in recipe.trained:
        tower.unfreeze()
    connector.requires_grad_("connector" in recipe.trained)
    dtype = getattr(torch, compute_dtype(profile.language.dtype, device))
    model = MultimodalLM(lm, connector.to(device, dtype), tower).train()
    if recipe.gradient_checkpointing:
        model.checkpoint_gradients()
    return model


def starting_connector(profile: Profile, origins: Origins, lm: Any) -> "Connector":
    """The bundle's connector, or a fresh one whose embeddings are of the size of the LM's own; in float32."""
    from safetensors.torch import load_file

    from mmllm_core.connectors import LmShape, build_connector

    shape = LmShape.of(lm.config)
    if origins.bundle:
        connector = build_connector(profile.connector, origins.d_vision, shape)
        connector.load_state_dict(load_file(origins.bundle / "connector.safetensors"))
        return connector
    size = float(lm.get_input_embeddings().weight.float().std())
    return build_connector(profile.connector, origins.d_vision, shape, output_std=size)


def _model_type(language: Path) -> str:
    """Of the LM in a folder, by its config.

    Raises:
        WeightsError: the folder holds no config of an LM that transformers knows.
    """
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(language, local_files_only=True).model_type)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{language}: holds no causal LM that can be loaded: {first_line(error)}") from error


def _require_equal_adapter(folder: Path, recipe: Recipe) -> None:
    from peft import PeftConfig

    if recipe.lora is None:
        raise ConfigError(
            f"from_bundle: '{recipe.from_bundle}' has an adapter, which is trained further: give the recipe 'lora'"
        )
    found: Any = PeftConfig.from_pretrained(str(folder))
    layers = found.layers_to_transform
    there = {"rank": found.r, "alpha": found.lora_alpha, "dropout": found.lora_dropout}
    there["layers"] = None if layers is None else len(layers)
    wanted = recipe.lora.model_dump(include=set(there))
    if recipe.lora.target_modules is not None:
        there["target_modules"] = sorted(found.target_modules)
        wanted["target_modules"] = sorted(recipe.lora.target_modules)
    for key, value in there.items():
        if value != wanted[key]:
            raise ConfigError(
                f"from_bundle: the adapter of '{recipe.from_bundle}' has {key} {value}, and the recipe's lora "
                f"{wanted[key]}: make them equal"
            )
