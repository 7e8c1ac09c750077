"""Serve configs by name, as they ship with mmllm, from YAML files, and within Serve's own config files.

Does not know what a config says.
"""

from pathlib import Path
from typing import Any

from mmllm_core.config import StrictModel, load_config, parse_config
from mmllm_core.errors import ConfigError
from mmllm_core.models.home import features_folder
from serve_apps.config import ServeConfig

_FOLDER = Path(__file__).parent / "configs"


class ServeArgs(StrictModel):
    """Arguments of `serve_apps.builder:app` in a Serve config file."""

    config: str | dict[str, Any] = "embedded"
    """A shipped config's name, a YAML file's path, or the config itself."""
    bundle: Path

    def serve_config(self) -> ServeConfig:
        """The config that is named or held.

        Raises:
            ConfigError: unknown name, unknown key, or settings that cannot work together.
        """
        if isinstance(self.config, dict):
            return parse_config(ServeConfig, self.config, "args.config")
        return load_serve_config(self.config)


def serve_config_names() -> list[str]:
    """Names of the configs that ship with mmllm."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_serve_config(name_or_path: str, overrides: dict[str, Any] | None = None) -> ServeConfig:
    """Load a config by name, or from a YAML file when a path is given.

    Args:
        overrides: dotted keys and their values, such as `{"http.port": 8001}`.

    Raises:
        ConfigError: unknown name, unknown key, or settings that cannot work together.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        return load_config(ServeConfig, Path(name_or_path), overrides)
    if name_or_path not in serve_config_names():
        known = ", ".join(serve_config_names())
        raise ConfigError(f"serve config '{name_or_path}' is unknown: choose one of {known} or give a YAML file")
    return load_config(ServeConfig, _FOLDER / f"{name_or_path}.yaml", overrides)


def with_feature_store(config: ServeConfig) -> ServeConfig:
    """The config with the feature store of this machine's settings for CLIP to read, if it names none itself."""
    if config.clip.feature_store is not None:
        return config
    return config.model_copy(update={"clip": config.clip.model_copy(update={"feature_store": features_folder()})})
