"""Folders of `k8s/` -> manifests, by kubectl's kustomize.

A target is a folder below `k8s/`, such as `overlays/prod-gpu` (or `prod-gpu` alone) and `jobs/align`. Components come
on top of it, in the order of `COMPONENTS`. Does not know what manifests say.
"""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.k8s.manifests import Manifest, read_manifests
from cluster.modalities import ROLES, VERSION
from mmllm_core.errors import ConfigError, EnvironmentLack

REGISTRY = "registry.invalid/mmllm"
"""Of images as they are written in `k8s/`: a name that never leads anywhere, so that nobody runs a stranger's image."""
COMPONENTS = (
    *("gpu", "vllm", "gcs-ft-redis", "monitoring", "gateway", "incremental-upgrade"),
    *("kueue", "spot", "s3-storage", "log-shipping"),
)
"""In the order that they are laid on in: vllm replaces settings of gpu's."""
_EXCLUDE = {frozenset({"gateway", "incremental-upgrade"}): "both make the Gateway that requests come through"}
_NEED = {"vllm": "gpu"}


@dataclass(frozen=True)
class Target:
    """What is rendered."""

    folder: Path
    """Of a kustomization."""
    root: Path
    """The folder `k8s`, where components are."""
    components: tuple[str, ...] = ()
    """Besides those that it has."""
    registry: str | None = None
    """Where its images are, in place of `REGISTRY`."""
    tag: str | None = None
    """Of its images, in place of this package's version."""


def default_root() -> Path:
    """The folder `k8s` of this checkout, or below the working directory."""
    beside = Path(__file__).resolve().parents[2] / "k8s"
    return beside if (beside / "overlays").is_dir() else Path("k8s")  # some package may be called so too


def overlays(root: Path) -> list[str]:
    """Names of the overlays."""
    return sorted(path.parent.name for path in (root / "overlays").glob("*/kustomization.yaml"))


def jobs(root: Path) -> list[str]:
    """Names of the jobs."""
    return sorted(
        path.parent.name for path in (root / "jobs").glob("*/kustomization.yaml") if path.parent.name != "base"
    )


def find_target(
    root: Path, name: str, components: list[str], registry: str | None = None, tag: str | None = None
) -> Target:
    """A target by its name.

    Args:
        root: the folder `k8s`.
        name: of an overlay, a folder below `root`, or one of your own that builds on one of these.
        components: that come on top, in any order.

    Raises:
        ConfigError: there is no such target or component, or components exclude or lack each other.
    """
    folder = next(
        (f for f in (root / "overlays" / name, root / name, Path(name)) if (f / "kustomization.yaml").is_file()), None
    )
    if folder is None and not overlays(root):
        raise ConfigError(f"there are no manifests in {root}: name the folder k8s of a checkout by --folder")
    if folder is None:
        known = ", ".join([*overlays(root), *(f"jobs/{job}" for job in jobs(root))])
        raise ConfigError(
            f"k8s target '{name}' is unknown: choose one of {known}, or a folder with a kustomization.yaml"
        )
    for component in components:
        if component not in COMPONENTS:
            raise ConfigError(f"component '{component}' is unknown: choose of {', '.join(COMPONENTS)}")
    own = _own_components(folder)
    if twice := sorted(own & set(components)):
        raise ConfigError(f"component '{twice[0]}' is part of {name} already: leave it out")
    if problem := conflict(own | set(components)):
        raise ConfigError(f"{name} with {', '.join(components)}: {problem}")
    return Target(folder, root, tuple(c for c in COMPONENTS if c in components), registry, tag)


def conflict(components: set[str]) -> str | None:
    """Why some components do not go together, or None."""
    for pair, why in _EXCLUDE.items():
        if pair <= components:
            return f"{' and '.join(sorted(pair))} exclude each other, for {why}"
    for component, needed in _NEED.items():
        if component in components and needed not in components:
            return f"{component} needs {needed}"
    return None


def _own_components(folder: Path) -> set[str]:
    """Those that a folder lays on itself, or that what it builds on does."""
    try:
        said = yaml.safe_load((folder / "kustomization.yaml").read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{folder}/kustomization.yaml: not valid YAML: {' '.join(str(error).split())}") from error
    found = {Path(path).name for path in said.get("components") or []} & set(COMPONENTS)
    below = [folder / path for path in said.get("resources") or [] if (folder / path / "kustomization.yaml").is_file()]
    return found.union(*(_own_components(each) for each in below))


def render(target: Target) -> list[Manifest]:
    """The target's manifests.

    Raises:
        EnvironmentLack: there is no kubectl.
        ConfigError: kustomize refuses it; the message is kustomize's own.
    """
    return read_manifests(render_text(target), str(target.folder))


def render_text(target: Target) -> str:
    """`render`, as one YAML stream."""
    if not (target.components or target.registry or target.tag):
        return _kustomize(target.folder, str(target.folder))
    with tempfile.TemporaryDirectory() as folder:  # kustomize wants relative paths, which may lead anywhere
        top = Path(folder).resolve()

        def relative(path: Path) -> str:
            return os.path.relpath(path.resolve(), top)

        kustomization: dict[str, object] = {
            "resources": [relative(target.folder)],
            "components": [relative(target.root / "components" / name) for name in target.components],
        }
        if target.registry or target.tag:
            names = dict.fromkeys(image for role in ROLES.values() for image in role.images)
            kustomization["images"] = [
                {
                    "name": f"{REGISTRY}/{name}",
                    "newName": f"{target.registry or REGISTRY}/{name}",
                    "newTag": target.tag or VERSION,
                }
                for name in names
            ]
        (top / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return _kustomize(top, f"{target.folder} with {', '.join(target.components) or 'images'}")


def _kustomize(folder: Path, name: str) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise EnvironmentLack("kubectl is not installed, and its kustomize renders the manifests: install kubectl 1.30")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        inner = re.search(r'"command failed" err=(?:<\s*(.*)>|"(.*)")\s*$', done.stderr, re.DOTALL)
        told = (inner[1] or inner[2]) if inner else done.stderr
        said = " ".join(told.split()).removeprefix("error: ") or f"exit code {done.returncode}"
        raise ConfigError(f"{name}: kustomize cannot build it: {said}")
    return done.stdout
