"""The exact packages that a submitted job was written against, and whether the nodes that run it have them.

In: versions of packages on the machine that submits. Out: an error that names every node and package that differs.
What is compared are the packages that `mmllm` itself asks for, and Python.
"""

import platform
import re
from collections.abc import Mapping
from importlib import metadata

from mmllm_core.errors import EnvironmentLack

PINS = "MMLLM_PINS"
"""Environment variable of a submitted job: versions by package, as JSON."""


def pins() -> dict[str, str]:
    """Versions on this machine, by package: of Python, and of what `mmllm` asks for without its extras."""
    wanted = [entry for entry in metadata.requires("mmllm") or [] if "extra ==" not in entry]
    names = [re.split(r"[^A-Za-z0-9._-]", entry, maxsplit=1)[0] for entry in wanted]
    return installed(names)


def installed(names: list[str]) -> dict[str, str]:
    """Versions of the named packages that are installed here; and of Python, to the minor."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in names:
        try:
            # a local version says how it was built, as in 2.14.1+cu130, and nodes may differ in that
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def require_pins(wanted: Mapping[str, str]) -> None:
    """Look at every node of the Ray that is connected, and at this one.

    Raises:
        EnvironmentLack: a node lacks a package, or has another version of it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    names = [name for name in wanted if name != "python"]
    asked = {"where the job runs": ray.put(installed(names))}
    task = ray.remote(num_cpus=0)(installed)
    for node in ray.nodes():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"] = task.options(
                scheduling_strategy=place
            ).remote(names)
    differing = []
    for place, found in zip(asked, ray.get(list(asked.values())), strict=True):
        differing += [
            f"{place} has {f'{name} {found[name]}' if name in found else f'no {name}'}, not {version}"
            for name, version in wanted.items()
            if found.get(name) != version
        ]
    if differing:
        raise EnvironmentLack(
            f"{'; '.join(differing)}: give all nodes the versions of the machine that submitted the job (the same "
            "image, or the same constraints.txt), or submit it with --no-pins"
        )
