"""Recipes by name: the YAML files beside this module, with `key=value` overrides on top."""

from pathlib import Path
from typing import Any

from mmllm_core.config import ClipRecipe, Profile, Recipe, load_config, read_yaml
from mmllm_core.errors import ConfigError
from mmllm_core.models.profile import load_profile

_FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with mmllm."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe | ClipRecipe:
    """Load a recipe by name, or from a YAML file when `name` is a path.

    A file with `architecture` trains CLIP; any other trains the multimodal LM.

    Raises:
        ConfigError: unknown name or a file that does not validate.
    """
    is_file = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else _FOLDER / f"{name}.yaml"
    if not is_file and name not in recipe_names():
        raise ConfigError(f"recipe '{name}' is unknown: choose one of {', '.join(recipe_names())} or give a YAML file")
    values = read_yaml(path)
    trains_clip = isinstance(values, dict) and "architecture" in values
    return load_config(ClipRecipe, path, overrides) if trains_clip else load_config(Recipe, path, overrides)


def load_training_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Load a recipe that trains the multimodal LM.

    Raises:
        ConfigError: as `load_recipe`, or the recipe trains CLIP.
    """
    recipe = load_recipe(name, overrides)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe '{name}' trains CLIP and takes no conversations: name one that trains the LM")
    return recipe


def recipe_profile(recipe: Recipe) -> Profile:
    """The profile that a recipe names, with the recipe's connector if it has one.

    Raises:
        ConfigError: as `load_profile`.
    """
    profile = load_profile(recipe.profile)
    return profile if recipe.connector is None else profile.model_copy(update={"connector": recipe.connector})
