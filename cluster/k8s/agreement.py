"""Do manifests, Serve configs and `cluster.modalities` say the same?

Images, limits and resources of each group against its role; the Serve config of a RayService against the groups that
are to hold its replicas: every replica must fit a pod of its modality, and of no other, and groups must be able to grow
as far as deployments may. Does not start or import Ray.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.k8s.manifests import (
    COMPONENT,
    INSTANCE,
    PART_OF,
    Finding,
    Manifest,
    PodTemplate,
    of_kind,
    pod_templates,
    title,
)
from cluster.modalities import RAY_VERSION, ROLES, Hardware, Limits, Role
from mmllm_core.errors import ConfigError
from serve_apps.access_config import is_loopback
from serve_apps.config import DeploymentConfig, ServeConfig
from serve_apps.config_files import ServeArgs

BUILDER = "serve_apps.builder:app"
_INSTANCES = {"RayService": "serving", "RayCluster": "development", "RayJob": "training"}
_GPU = "nvidia.com/gpu"
_APPLICATION = {"name", "route_prefix", "import_path", "args"}
_TOP = {"proxy_location", "http_options", "applications"}


def agreement_findings(manifests: list[Manifest], context: list[Manifest]) -> list[Finding]:
    """Where they differ.

    Args:
        context: manifests that are there besides.
    """
    found = []
    pods = [pod for pod in pod_templates(manifests) if pod.group is not None]
    for pod in pods:
        found += [Finding(pod.where, said) for said in _role_of(pod, [p for p in pods if p.owner is pod.owner])]
    for manifest in of_kind(manifests, "RayService"):
        mine = {str(pod.component): pod for pod in pods if pod.owner is manifest}
        found += [Finding(f"{title(manifest)} serveConfigV2", said) for said in _service(manifest, mine)]
    found += [f for settings in of_kind([*manifests, *context], "ConfigMap") for f in _settings(settings)]
    found += [f for manifest in of_kind(manifests, "HTTPRoute") for f in _route(manifest, [*manifests, *context])]
    return found


def hardware_of(pods: list[PodTemplate]) -> Hardware:
    """What a cluster's pods run on: `gpu` if any of them has one."""
    limits = [((c.get("resources") or {}).get("limits") or {}) for pod in pods for c in pod.containers]
    return "gpu" if any(_GPU in limit for limit in limits) else "cpu"


def _role_of(pod: PodTemplate, cluster: list[PodTemplate]) -> Iterator[str]:
    group = pod.group or {}
    name = "head" if pod.node == "head" else str(group.get("groupName"))
    role = ROLES.get(name)  # type: ignore[call-overload]
    if role is None:
        yield f"group '{name}' is none of the roles {', '.join(ROLES)}"
        return
    wanted = {COMPONENT: name, INSTANCE: _INSTANCES[pod.owner["kind"]], PART_OF: "mmllm"}
    for label, value in wanted.items():
        if pod.labels.get(label) != value:
            yield f"label {label} is {pod.labels.get(label)} and should be {value}: network policies go by it"
    if (version := str(pod.cluster.get("rayVersion"))) != RAY_VERSION:
        yield f"rayVersion is {version} and images hold Ray {RAY_VERSION}"
    first = (pod.spec.get("containers") or [{}])[0]
    image = re.sub(r"[:@].*", "", str(first.get("image")).rpartition("/")[2])
    if image not in role.images:
        yield f"image {first.get('image')} is not one of {name}'s: {', '.join(role.images)}"
    yield from _limits(first, role, name, hardware_of(cluster))
    yield from _offered(group, role, name)


def _limits(container: dict[str, Any], role: Role, name: str, hardware: Hardware) -> Iterator[str]:
    limits = (container.get("resources") or {}).get("limits") or {}
    wanted = role.limits(hardware)
    if wanted is None:
        yield f"{name} does not run on {hardware}"
        return
    has = Limits(str(limits.get("cpu")), str(limits.get("memory")), int(limits.get(_GPU, 0)))
    if has != wanted:
        yield f"limits are {_told(has)} and cluster/modalities.py says {_told(wanted)} for {name} on {hardware}"


def _told(limits: Limits) -> str:
    return f"cpu {limits.cpu}, memory {limits.memory}, {limits.gpus} GPUs"


def _offered(group: dict[str, Any], role: Role, name: str) -> Iterator[str]:
    offered = {str(k): str(v) for k, v in (group.get("resources") or {}).items()}
    custom = {k: v for k, v in offered.items() if k not in ("CPU", "GPU", "memory")}
    if custom != ({role.resource: "1"} if role.resource else {}):
        wanted = f"{role.resource}: 1" if role.resource else "none"
        yield f"custom resources are {custom or 'none'} and should be {wanted}: replicas ask for them by this name"
    if (role.resource or name == "head") and offered.get("CPU") != "0":
        yield f"offers CPU {offered.get('CPU')} to Ray and should offer 0: other actors would come to lie on {name}"


def read_serve_config(manifest: Manifest) -> tuple[ServeArgs, ServeConfig, dict[str, Any]]:
    """The arguments, config and HTTP options of a RayService's application.

    Raises:
        ConfigError: it is not one application of ours, or its config does not validate.
    """
    try:
        serve = yaml.safe_load(manifest["spec"].get("serveConfigV2") or "")
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(serve, dict) or len(serve.get("applications") or []) != 1:
        raise ConfigError("one application is wanted")
    [application] = serve["applications"]
    # Serve takes keys that it does not know, and a deployment's settings twice: ours are all in args.config.
    if unknown := sorted([*(serve.keys() - _TOP), *(application.keys() - _APPLICATION)]):
        raise ConfigError(f"unknown key '{unknown[0]}': everything about deployments is said in args.config")
    if application.get("import_path") != BUILDER:
        raise ConfigError(f"import_path is {application.get('import_path')} and should be {BUILDER}")
    try:
        args = ServeArgs.model_validate(application.get("args"))
    except ValidationError as error:
        raise ConfigError(f"args: {' '.join(str(error).split())}") from error
    return args, args.serve_config(), serve.get("http_options") or {}


def _service(manifest: Manifest, pods: dict[str, PodTemplate]) -> Iterator[str]:
    try:
        args, config, http = read_serve_config(manifest)
    except ConfigError as error:
        yield str(error)
        return
    if is_loopback(str(http.get("host", "0.0.0.0"))):
        yield f"http_options.host {http['host']} is this pod alone: nobody would reach the service"
    if (http.get("host"), http.get("port", 8000)) != (config.http.host, config.http.port):
        yield "http_options and args.config.http name different hosts or ports"
    if config.http.proxy != "serve":
        yield f"args.config.http.proxy is {config.http.proxy}, which is for the Ray that 'mmllm serve' starts"
    for name, role in ROLES.items():
        if role.field is not None:
            if name not in pods:
                yield f"there is no group {name} for {role.field}'s replicas"
                continue
            yield from _fits(getattr(config, role.field), name, pods[name])
    timeout = config.limits.request_timeout_s
    for pod in pods.values():
        yield from _paths(args, config, pod)
        if pod.node == "worker":
            yield from _drains(pod, timeout)
    if (delay := manifest["spec"].get("rayClusterDeletionDelaySeconds", 60)) <= timeout:
        yield f"spec.rayClusterDeletionDelaySeconds {delay} is not above limits.request_timeout_s {timeout:g}"


def _fits(config: DeploymentConfig, name: str, pod: PodTemplate) -> Iterator[str]:
    group, options = pod.group or {}, config.ray_actor_options
    offered = _numbers(group, pod)
    asked = {"CPU": options.num_cpus, "GPU": options.num_gpus} | dict(options.resources)
    counts = [offered.get(key, 0) / amount for key, amount in asked.items() if amount > 0]
    held = int(min(counts)) if counts else 0
    if held < 1:
        yield f"a replica of {name} asks for {_nonzero(asked)} and a pod of it offers {_nonzero(offered)}: none fits"
        return
    least = config.autoscaling.min_replicas if config.autoscaling else config.max_replicas
    if group["maxReplicas"] * held < config.max_replicas:
        yield (
            f"{name} may have {config.max_replicas} replicas, {held} a pod, and its group no more than "
            f"{group['maxReplicas']} pods: the last ones would wait for ever"
        )
    if least == 0 and group["minReplicas"] > 0:
        yield f"{name} may go to 0 replicas, and its group keeps {group['minReplicas']} pods: set minReplicas 0"
    if group["minReplicas"] * held < least:
        yield f"{name} has {least} replicas at least, and minReplicas {group['minReplicas']} is too few pods for them"


def _numbers(group: dict[str, Any], pod: PodTemplate) -> dict[str, float]:
    """What Ray would plan with: the group's resources, and GPUs by the limit where they are not said."""
    limits = ((pod.spec.get("containers") or [{}])[0].get("resources") or {}).get("limits") or {}
    offered = {"GPU": float(limits.get(_GPU, 0))}
    return offered | {key: float(value) for key, value in (group.get("resources") or {}).items() if key != "memory"}


def _nonzero(amounts: dict[str, float]) -> str:
    return ", ".join(f"{key} {amount:g}" for key, amount in amounts.items() if amount) or "nothing"


def _paths(args: ServeArgs, config: ServeConfig, pod: PodTemplate) -> Iterator[str]:
    mounts = {m["mountPath"]: m for m in pod.spec["containers"][0].get("volumeMounts") or []}
    volumes = {v["name"]: v for v in pod.spec.get("volumes") or []}

    def volume_of(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
        at = max((p for p in mounts if path == p or path.startswith(f"{p}/")), key=len, default="")
        return mounts.get(at, {}), volumes.get(mounts.get(at, {}).get("name"), {})

    if "persistentVolumeClaim" not in volume_of(str(args.bundle))[1]:
        yield f"the bundle {args.bundle} is on no claimed volume of {pod.component}"
    if config.access.keys_file and "secret" not in volume_of(str(config.access.keys_file))[1]:
        yield f"access.keys_file {config.access.keys_file} is in no secret that {pod.component} mounts"
    if config.files and pod.component == "ingress":
        mount, volume = volume_of(str(config.files.folder))
        if "persistentVolumeClaim" not in volume or mount.get("readOnly"):
            yield f"files.folder {config.files.folder} is on no claimed volume that {pod.component} may write"


def _drains(pod: PodTemplate, timeout: float) -> Iterator[str]:
    lifecycle = pod.spec["containers"][0].get("lifecycle") or {}
    command = ((lifecycle.get("preStop") or {}).get("exec") or {}).get("command") or []
    waits = int(command[-1]) if command and command[-1].isdigit() and "drain.sh" in command[-2] else 0
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    if waits <= timeout:
        yield f"{pod.component}: preStop waits {waits} s and requests may take {timeout:g} s: they would be cut off"
    if grace <= waits:
        yield f"{pod.component}: terminationGracePeriodSeconds {grace} is not above the {waits} s that preStop waits"


def _settings(manifest: Manifest) -> Iterator[Finding]:
    if not manifest["metadata"]["name"].startswith("mmllm-settings"):
        return
    from serve_apps.proxy import PROXY_ENVIRONMENT

    data = manifest.get("data") or {}
    for name, value in PROXY_ENVIRONMENT.items():
        if data.get(name) != value:
            yield Finding(
                title(manifest), f"{name} is {data.get(name)} and should be {value}: proxies would pass all on"
            )


def _route(manifest: Manifest, there: list[Manifest]) -> Iterator[Finding]:
    services = {f"{m['metadata']['name']}-serve-svc": m for m in of_kind(there, "RayService")}
    for rule in manifest["spec"].get("rules") or []:
        for backend in rule.get("backendRefs") or []:
            if backend["name"] not in services or backend.get("port") != 8000:
                yield Finding(
                    title(manifest), f"backend {backend['name']}:{backend.get('port')} is no service of Serve's"
                )
                continue
            try:
                config = read_serve_config(services[backend["name"]])[1]
            except ConfigError:
                continue  # said of the RayService
            text = str((rule.get("timeouts") or {}).get("request", ""))
            if not text.endswith("s") or float(text[:-1]) <= config.limits.request_timeout_s:
                said = f"timeouts.request '{text}' is not above the service's {config.limits.request_timeout_s:g}s"
                yield Finding(title(manifest), said)
