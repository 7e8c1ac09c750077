"""YAML and `key=value` -> validated models: an unknown key is an error that names the key.

Knows how a config is read and how its errors are told; not what configs hold.
"""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmllm_core.errors import ConfigError


class StrictModel(BaseModel):
    """A frozen model that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=StrictModel)


def parse_config(model: type[ConfigT], values: Any, where: str) -> ConfigT:
    """Validate `values` as `model`.

    Args:
        where: what the values came from (a file, an option), named in the error.

    Raises:
        ConfigError: one line that names every offending key and the reason.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping of keys to values, found {type(values).__name__}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise ConfigError(f"{where}: {problems}") from error


def load_config(model: type[ConfigT], path: Path, overrides: dict[str, Any] | None = None) -> ConfigT:
    """Read a YAML file as `model`, with dotted `overrides` such as `{"lora.rank": 8}` on top.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds an unknown key or a wrong value.
    """
    values = read_yaml(path)
    if isinstance(values, dict):
        apply_overrides(values, overrides or {})
    return parse_config(model, values, str(path))


def apply_overrides(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Set values by dotted keys, in place; of a key that leads nowhere, what is lacking is made.

    Raises:
        ConfigError: a key that goes into a list names no place in it.
    """
    for dotted, value in overrides.items():
        _set_dotted(values, dotted, value)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, not validated.

    Raises:
        ConfigError: the file is missing, cannot be read, or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """Turn `["steps=20", "lora.rank=8"]` into `{"steps": 20, "lora.rank": 8}`; values are read as YAML.

    Raises:
        ConfigError: an item without `=`, or with a value that is not YAML.
    """
    overrides = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"override '{item}': expected key=value, for example steps=20")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{item}': the value is not valid YAML") from error
    return overrides


def _set_dotted(values: Any, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        key = _key(values, parent, dotted)
        if isinstance(values, dict) and not isinstance(values.get(key), dict | list):
            values[key] = {}
        values = values[key]
    values[_key(values, leaf, dotted)] = value


def _key(values: Any, part: str, dotted: str) -> Any:
    """A part of a dotted key as what it indexes: a mapping's key, or a place in a list."""
    if isinstance(values, dict):
        return part
    if isinstance(values, list) and part.isdigit() and int(part) < len(values):
        return int(part)
    raise ConfigError(f"override '{dotted}': there is no '{part}' to change")


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "top level"
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    if problem["type"] == "missing":
        return f"missing key '{key}'"
    return f"'{key}': {problem['msg'].removeprefix('Value error, ')}"
