"""Profiles: which weights make an assistant. `embedded` runs on a laptop, `phi` on a GPU."""

from pathlib import Path

from mmllm_core.config import PathSource, Profile, load_config
from mmllm_core.errors import ConfigError

_FOLDER = Path(__file__).parent / "profiles"


def profile_names() -> list[str]:
    """Names of the profiles that ship with mmllm."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """Load a profile by name, or from a YAML file when `name` is a path.

    Relative paths in the file start from the working directory, as everywhere on the command line, and come back
    absolute: workers run elsewhere.

    Raises:
        ConfigError: unknown name or a file that does not validate.
    """
    if name.endswith((".yaml", ".yml")):
        return _with_absolute_paths(load_config(Profile, Path(name)))
    if name not in profile_names():
        raise ConfigError(
            f"profile '{name}' is unknown: choose one of {', '.join(profile_names())} or give a YAML file"
        )
    return load_config(Profile, _FOLDER / f"{name}.yaml")


def _with_absolute_paths(profile: Profile) -> Profile:
    parts = {}
    for name in ("vision", "audio", "language"):
        part = getattr(profile, name)
        if isinstance(part.source, PathSource):
            source = PathSource(path=part.source.path.expanduser().absolute())
            parts[name] = part.model_copy(update={"source": source})
    return profile.model_copy(update=parts)
