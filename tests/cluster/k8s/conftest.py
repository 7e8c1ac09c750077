"""Manifests as they are rendered, each combination once a session, and where the tools of these tests are."""

import copy
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from cluster.k8s.manifests import Manifest
from cluster.k8s.render import default_root, find_target, render

ROOT = default_root()
Rendered = Callable[..., list[Manifest]]


@pytest.fixture(scope="session")
def crds() -> Path:
    """KubeRay's CRDs, which are nobody's to ship but KubeRay's."""
    folder = Path(os.environ.get("MMLLM_TEST_KUBERAY_CRDS") or ROOT.parent.parent / "shared/data/kuberay-crds-1.7.0")
    if not folder.exists():
        pytest.skip(f"no CRDs of KubeRay's in {folder}: name a folder of them in MMLLM_TEST_KUBERAY_CRDS")
    return folder


@cache
def _render(name: str, components: tuple[str, ...]) -> list[Manifest]:
    return render(find_target(ROOT, name, list(components)))


@pytest.fixture(scope="session")
def rendered() -> Rendered:
    """Renders a target with components on top; what it returns may be changed."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl, whose kustomize renders the manifests")

    def of(name: str, *components: str) -> list[Manifest]:
        return copy.deepcopy(_render(name, components))

    return of


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The object of a kind (and name) among some."""
    [found] = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    return found
