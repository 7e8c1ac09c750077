"""Serve configs by name, as they ship with mmllm, and from YAML files. Does not know what a config says."""

from pathlib import Path
from typing import Any

from mmllm_core.config import load_config
from mmllm_core.errors import ConfigError
from serve_apps.config import ServeConfig

_FOLDER = Path(__file__).parent / "configs"


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
