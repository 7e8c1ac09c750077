"""What other packages add to mmllm: found by the entry points that they declare, and loaded when asked for by name.

A package declares `[project.entry-points."mmllm.connectors"]` (name: a config class) or `"mmllm.engines"` (name: what
starts an engine). Does not know what either promises: `mmllm_core.config.connectors`, `mmllm_core.engine.protocol`.
"""

from importlib.metadata import entry_points
from typing import Any, Literal

from mmllm_core.errors import ConfigError

Group = Literal["mmllm.connectors", "mmllm.engines"]


def extension_names(group: Group) -> list[str]:
    """Names that installed packages add, sorted."""
    return sorted(entry_points(group=group).names)


def load_extension(group: Group, name: str) -> Any:
    """What a package added under a name.

    Raises:
        ConfigError: no installed package adds it, several do, or it cannot be imported.
    """
    found = list(entry_points(group=group, name=name))
    if len(found) != 1:
        packages = ", ".join(sorted(point.dist.name for point in found if point.dist)) or "no installed package"
        raise ConfigError(f"'{name}' is added to {group} by {packages}: one must do so")
    try:
        return found[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"'{name}' of {group}: {found[0].value} cannot be imported: {error}") from error
