"""A job as a RayJob manifest for Kubernetes: KubeRay starts a cluster for it, runs it, tries it again and cleans up.

In: a `Job`, and how many pods of which image. Out: YAML that needs nothing but the namespace, the volumes and the
accounts of `k8s/base`. It is the job of `k8s/jobs/base` with another command; recipes that are files go along in a
ConfigMap, and all else that the job reads is in the image or on the volumes. Does not talk to Kubernetes.
"""

import re
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.job_submission import Job
from mmllm_core.errors import ConfigError, EnvironmentLack

_LARGEST_NAME = 47
"""KubeRay appends to a RayJob's name, and 63 characters are the most of Kubernetes."""
_FILES = "/etc/mmllm/job"


@dataclass(frozen=True)
class RayJobOptions:
    """Of the cluster that is made for one job."""

    name: str | None
    """One is made up if None."""
    image: str
    nodes: int
    """Worker pods."""
    retries: int
    """How often KubeRay starts the job again, on a new cluster; training goes on from its last checkpoint."""


def manifest(job: Job, options: RayJobOptions) -> str:
    """YAML documents for `kubectl create -f -`.

    Raises:
        ConfigError: the name is none of Kubernetes', or a file is too large for a ConfigMap.
        EnvironmentLack: there is no `k8s` beside this package, which was not installed from a checkout.
    """
    name = options.name or f"mmllm-{job.arguments[0]}-{secrets.token_hex(3)}"
    if len(name) > _LARGEST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ConfigError(
            f"--name {name}: Kubernetes takes at most {_LARGEST_NAME} small letters, digits and hyphens, a letter first"
        )
    root = Path(__file__).resolve().parents[1] / "k8s"
    try:
        ray_job = yaml.safe_load((root / "jobs/base/rayjob.yaml").read_text(encoding="utf-8"))
        lines = (root / "components/settings/settings.env").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EnvironmentLack(f"{error.filename}: not found: install mmllm from a checkout of it") from error
    settings = dict(line.split("=", 1) for line in lines if "=" in line)
    files = _files(job)
    arguments = tuple(f"{_FILES}/{files[item]}" if item in files else item for item in job.arguments)
    placed = replace(job, arguments=arguments)

    spec = ray_job["spec"]
    ray_job["metadata"]["name"] = name
    spec["entrypoint"] = placed.entrypoint
    spec["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": placed.variables()}, sort_keys=True)
    spec["backoffLimit"] = options.retries
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    for count in ("replicas", "minReplicas", "maxReplicas"):
        workers[count] = options.nodes
    maps = [_config_map(ray_job, f"{name}-settings", settings)]
    if files:
        read = {key: (job.folder / path).read_text(encoding="utf-8") for path, key in files.items()}
        maps.append(_config_map(ray_job, f"{name}-files", read))
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]
    for template in (spec["submitterPodTemplate"], head, workers["template"]):
        template["spec"] = _pod(template["spec"], options.image, name, with_files=bool(files))
    return yaml.dump_all([*maps, ray_job], Dumper=_WithoutAnchors, sort_keys=False)


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


def _config_map(ray_job: dict[str, Any], name: str, data: dict[str, str]) -> dict[str, Any]:
    metadata = {key: ray_job["metadata"][key] for key in ("namespace", "labels")}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name} | metadata, "data": data}


def _pod(pod: dict[str, Any], image: str, name: str, *, with_files: bool) -> dict[str, Any]:
    """Of another image, with the job's own settings and files."""
    (container,) = pod["containers"]
    container = container | {"image": image, "envFrom": [{"configMapRef": {"name": f"{name}-settings"}}]}
    volumes = pod["volumes"]
    if with_files:
        container["volumeMounts"] = [*container["volumeMounts"], {"name": "job-files", "mountPath": _FILES}]
        volumes = [*volumes, {"name": "job-files", "configMap": {"name": f"{name}-files"}}]
    return pod | {"containers": [container], "volumes": volumes}


class _WithoutAnchors(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Say everything where it stands: the template's parts are shared, and people read this."""
        return True
