"""How two renderings differ, object by object."""

import difflib
from collections.abc import Iterator

import yaml

from cluster.k8s.manifests import Manifest


def difference(before: list[Manifest], after: list[Manifest]) -> Iterator[str]:
    """Lines of a unified diff, one section for each object that was added, removed or changed.

    Generated ConfigMaps carry a hash of what they hold in their names, so that a changed one is a new one.
    """
    old, new = _by_name(before), _by_name(after)
    for name in sorted(old.keys() | new.keys()):
        left, right = _lines(old.get(name)), _lines(new.get(name))
        yield from difflib.unified_diff(left, right, f"a/{name}", f"b/{name}", lineterm="")


def _by_name(manifests: list[Manifest]) -> dict[str, Manifest]:
    return {f"{m['kind']}/{m['metadata'].get('namespace', '')}/{m['metadata'].get('name')}": m for m in manifests}


def _lines(manifest: Manifest | None) -> list[str]:
    return [] if manifest is None else yaml.safe_dump(manifest, width=10_000).splitlines()
