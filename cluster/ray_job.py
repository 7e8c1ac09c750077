"""A job as a RayJob manifest for Kubernetes: KubeRay starts a cluster for it, runs it, tries it again and cleans up.

In: a `Job`, and how many pods of which image. Out: YAML. Recipes that are files go along in a ConfigMap; all else that
the job reads is in the image or on the volumes of the `mmllm` namespace. Pods satisfy the pod security standard
`restricted`. Does not talk to Kubernetes.
"""

import re
import secrets
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.job_submission import Job
from mmllm_core.errors import ConfigError

RAY_VERSION = "2.60.0"
NAMESPACE = "mmllm"
_LARGEST_NAME = 47
"""KubeRay appends to a RayJob's name, and 63 characters are the most of Kubernetes."""
_FILES = "/etc/mmllm/job"
_HOME = "/var/lib/mmllm"
_CLAIMS = {
    "bundles": "bundles",
    "features": "features",
    "checkpoints": "ray",
    "data": "data",
    "weights": "weights",
}
"""Volume claims `mmllm-NAME`, and where each lies in the home folder."""


@dataclass(frozen=True)
class RayJobOptions:
    """Of the cluster that is made for one job."""

    name: str | None
    image: str
    nodes: int
    retries: int
    """How often KubeRay starts the job again, on a new cluster; training goes on from its last checkpoint."""
    keep_s: int = 3600
    """How long the job and its log stay after it has ended."""


def manifest(job: Job, options: RayJobOptions) -> str:
    """YAML documents for `kubectl create -f -`.

    Raises:
        ConfigError: the name is none of Kubernetes', or a file is too large for a ConfigMap.
    """
    name = options.name or f"mmllm-{job.arguments[0]}-{secrets.token_hex(3)}"
    if len(name) > _LARGEST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ConfigError(
            f"--name {name}: Kubernetes takes at most {_LARGEST_NAME} small letters, digits and hyphens, a letter first"
        )
    files = _files(job)
    arguments = tuple(f"{_FILES}/{files[item]}" if item in files else item for item in job.arguments)
    placed = Job(arguments, job.folder, job.environment, job.pinned)
    documents: list[dict[str, Any]] = []
    if files:
        data = {key: (job.folder / path).read_text(encoding="utf-8") for path, key in files.items()}
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(name), "data": data})
    documents.append(
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": _metadata(name),
            "spec": {
                "entrypoint": placed.entrypoint,
                "runtimeEnvYAML": yaml.safe_dump({"env_vars": placed.variables()}, sort_keys=True),
                "submissionMode": "K8sJobMode",
                "backoffLimit": options.retries,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": options.keep_s,
                "rayClusterSpec": _cluster(name, options, bool(files)),
            },
        }
    )
    return yaml.safe_dump_all(documents, sort_keys=False)


def _files(job: Job) -> dict[str, str]:
    """Recipes of the folder among the arguments, and the name of each in the ConfigMap."""
    found = {}
    for item in job.arguments:
        path = job.folder / item
        if item.endswith((".yaml", ".yml")) and path.is_file():
            if path.stat().st_size > 900_000:
                raise ConfigError(f"{path}: a ConfigMap takes 1 MiB: is this a recipe?")
            found[item] = item.replace("/", "_")
    return found


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "namespace": NAMESPACE, "labels": {"app.kubernetes.io/part-of": "mmllm"}}


def _cluster(name: str, options: RayJobOptions, with_files: bool) -> dict[str, Any]:
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": "mmllm-ray-token"},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "resources": {"CPU": "0"},
            "rayStartParams": {"dashboard-host": "0.0.0.0"},
            "template": _pod(name, options, with_files, role="head", cpu="2", memory="8Gi"),
        },
        "workerGroupSpecs": [
            {
                "groupName": "train",
                "replicas": options.nodes,
                "minReplicas": options.nodes,
                "maxReplicas": options.nodes,
                "rayStartParams": {},
                "template": _pod(name, options, with_files, role="worker", cpu="4", memory="16Gi"),
            }
        ],
    }


def _pod(name: str, options: RayJobOptions, with_files: bool, *, role: str, cpu: str, memory: str) -> dict[str, Any]:
    mounts = [{"name": claim, "mountPath": f"{_HOME}/{folder}"} for claim, folder in _CLAIMS.items()]
    volumes: list[dict[str, Any]] = [
        {"name": claim, "persistentVolumeClaim": {"claimName": f"mmllm-{claim}"}} for claim in _CLAIMS
    ]
    mounts += [{"name": "shared-memory", "mountPath": "/dev/shm"}, {"name": "tmp", "mountPath": "/tmp"}]
    volumes += [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}},
    ]
    if with_files:
        mounts.append({"name": "job", "mountPath": _FILES})
        volumes.append({"name": "job", "configMap": {"name": name}})
    limits = {"cpu": cpu, "memory": memory}
    container = {
        "name": f"ray-{role}",
        "image": options.image,
        "envFrom": [{"configMapRef": {"name": "mmllm-settings"}}],
        "resources": {"requests": dict(limits), "limits": dict(limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    return {
        "metadata": {"labels": {"app.kubernetes.io/part-of": "mmllm", "app.kubernetes.io/instance": name}},
        "spec": {
            "serviceAccountName": "mmllm-worker",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "runAsGroup": 10001,
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": volumes,
        },
    }
