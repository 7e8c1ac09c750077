"""The roles that pods have on a cluster: resource names, images and limits of each, said here and nowhere else.

A modality's resource is the name that its deployment asks for (`serve_apps.config`); its pods offer it, so that the
autoscaler starts the right kind of node. Manifests under `k8s/` and Serve configs are checked against this. Knows
neither Ray nor Kubernetes' client.
"""

from dataclasses import dataclass
from typing import Literal

import mmllm_core
from serve_apps.config import ClipConfig, DeploymentConfig, IngressConfig, PhiConfig, WhisperConfig

Hardware = Literal["cpu", "gpu"]
RoleName = Literal["head", "ingress", "vision", "audio", "text", "train"]

VERSION = mmllm_core.__version__
"""Tag of every image."""
RAY_VERSION = "2.60.0"


@dataclass(frozen=True)
class Limits:
    """What a pod's Ray container may use; it requests all of it, for Ray plans by its limits."""

    cpu: str
    memory: str
    gpus: int = 0


@dataclass(frozen=True)
class Role:
    """What one kind of pod is for."""

    images: tuple[str, ...]
    """Names of images that it may run; the first is the usual one."""
    cpu: Limits | None
    gpu: Limits
    config: type[DeploymentConfig] | None = None
    """Of the deployment whose replicas it holds."""
    field: str | None = None
    """Where that is in a `ServeConfig`."""

    @property
    def resource(self) -> str | None:
        """The custom resource that its pods offer to Ray, one each; None if any pod would do."""
        return self.config.modality if self.config else None

    def limits(self, hardware: Hardware) -> Limits | None:
        """Limits of its pods on some hardware; None if it does not run there."""
        return self.gpu if hardware == "gpu" else self.cpu


ROLES: dict[RoleName, Role] = {
    "head": Role(("serve", "train"), Limits("1", "4Gi"), Limits("4", "16Gi")),
    "ingress": Role(("serve",), Limits("1", "4Gi"), Limits("4", "8Gi"), IngressConfig, "ingress"),
    "vision": Role(("vision",), Limits("1", "4Gi"), Limits("4", "16Gi", 1), ClipConfig, "clip"),
    "audio": Role(("audio",), Limits("1", "4Gi"), Limits("4", "16Gi", 1), WhisperConfig, "whisper"),
    "text": Role(("text", "text-vllm"), Limits("2", "8Gi"), Limits("8", "48Gi", 1), PhiConfig, "phi"),
    "train": Role(("train",), None, Limits("8", "64Gi", 1)),
}
"""By the name of the worker group, which is also the pods' `app.kubernetes.io/component`."""

RESOURCES: tuple[str, ...] = tuple(role.resource for role in ROLES.values() if role.resource)
"""Names of all modalities' resources."""

FIELDS: dict[str, str] = {role.resource: role.field for role in ROLES.values() if role.resource and role.field}
"""Modality -> its section of a serve config."""
