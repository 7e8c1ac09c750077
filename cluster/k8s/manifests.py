"""Manifests as Python sees them: parsed YAML, the pod templates in it, and findings about it.

Knows where KubeRay's custom resources keep their clusters and pods; not what is right or wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from mmllm_core.errors import ConfigError

Manifest = dict[str, Any]
"""One Kubernetes object."""

COMPONENT, INSTANCE, PART_OF = (f"app.kubernetes.io/{name}" for name in ("component", "instance", "part-of"))

CLUSTER_AT = {"RayService": ("rayClusterConfig",), "RayCluster": (), "RayJob": ("rayClusterSpec",)}
"""Below `spec`: where each kind keeps its cluster."""
_POD_AT = {"Deployment": ("template",), "StatefulSet": ("template",), "DaemonSet": ("template",), "Job": ("template",)}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a manifest."""

    where: str
    """Kind, name and path, such as `RayService/mmllm spec.rayClusterConfig.headGroupSpec`."""
    said: str
    """What is wrong, and what to do."""

    def __str__(self) -> str:
        return f"{self.where}: {self.said}"


@dataclass(frozen=True)
class PodTemplate:
    """The pods that some object makes."""

    owner: Manifest
    where: str
    labels: dict[str, str]
    spec: dict[str, Any]
    group: dict[str, Any] | None = None
    """Of a Ray cluster: the head's or a worker group's spec, and None for other pods."""
    node: str | None = None
    """Of a Ray cluster: `head` or `worker`."""
    cluster: dict[str, Any] = field(default_factory=dict)
    """Of a Ray cluster: its spec."""

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All of its containers; Ray's is the first."""
        return [*self.spec.get("containers", []), *self.spec.get("initContainers", [])]

    @property
    def component(self) -> str | None:
        """The role that its label names."""
        return self.labels.get(COMPONENT)

    @property
    def labels_when_it_runs(self) -> dict[str, str]:
        """Its labels with those that KubeRay adds."""
        if self.node is None:
            return self.labels
        group = "headgroup" if self.node == "head" else str((self.group or {}).get("groupName"))
        return {"ray.io/is-ray-node": "yes", "ray.io/node-type": self.node, "ray.io/group": group} | self.labels


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The C loader is ten times as fast on schemas of a megabyte, and not everywhere."""


_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: loader.construct_scalar(node))
"""A bare `=`, which occurs in schemas, means itself."""


def read_manifests(text: str, where: str) -> list[Manifest]:
    """The objects in a stream of YAML documents.

    Raises:
        ConfigError: it is no YAML, or a document is no object of Kubernetes'.
    """
    try:
        documents = [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    for number, document in enumerate(documents):
        if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
            raise ConfigError(f"{where}: document {number} lacks apiVersion, kind or metadata: it is no manifest")
    return documents


def title(manifest: Manifest) -> str:
    """`Kind/name`."""
    return f"{manifest['kind']}/{manifest['metadata'].get('name')}"


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    """Those of some kinds."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def ray_cluster(manifest: Manifest) -> tuple[dict[str, Any], str] | None:
    """The Ray cluster that an object describes, and where; None if it describes none."""
    if manifest["kind"] not in CLUSTER_AT:
        return None
    keys = ("spec", *CLUSTER_AT[manifest["kind"]])
    spec: Any = manifest
    for key in keys:
        spec = spec.get(key) if isinstance(spec, dict) else None
    return (spec, f"{title(manifest)} {'.'.join(keys)}") if isinstance(spec, dict) else None


def pod_templates(manifests: list[Manifest]) -> Iterator[PodTemplate]:
    """All pods that would come of some manifests, but for the containers that KubeRay adds."""
    for manifest in manifests:
        if found := ray_cluster(manifest):
            yield from _ray_pods(manifest, *found)
        spec = manifest.get("spec") or {}
        submitter = spec.get("submitterPodTemplate") if manifest["kind"] == "RayJob" else None
        if submitter:
            yield _pod(manifest, f"{title(manifest)} spec.submitterPodTemplate", submitter)
        if manifest["kind"] in _POD_AT:
            yield _pod(manifest, f"{title(manifest)} spec.template", spec.get("template") or {})


def _ray_pods(manifest: Manifest, cluster: dict[str, Any], where: str) -> Iterator[PodTemplate]:
    groups = [("headGroupSpec", "head", cluster.get("headGroupSpec") or {})]
    groups += [
        (f"workerGroupSpecs[{index}] ({group.get('groupName')})", "worker", group)
        for index, group in enumerate(cluster.get("workerGroupSpecs") or [])
    ]
    for at, node, group in groups:
        template = group.get("template") or {}
        pod = _pod(manifest, f"{where}.{at}", template)
        yield PodTemplate(pod.owner, pod.where, pod.labels, pod.spec, group, node, cluster)


def _pod(owner: Manifest, where: str, template: dict[str, Any]) -> PodTemplate:
    labels = (template.get("metadata") or {}).get("labels") or {}
    return PodTemplate(owner, where, labels, template.get("spec") or {})
