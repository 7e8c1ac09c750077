"""What every pod of ours keeps to: the pod security standard `restricted` and more, resources, probes, references.

Knows nothing of modalities (`cluster.k8s.agreement`) or of KubeRay's rules (`cluster.k8s.kuberay`).
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from cluster.k8s.manifests import Finding, Manifest, PodTemplate, of_kind, pod_templates, title
from cluster.k8s.network import selects

NAMESPACE = "mmllm"
SECRETS = {"mmllm-ray-token", "mmllm-api-keys", "mmllm-redis", "mmllm-s3", "mmllm-tls"}
"""Made by hand, as the README says: no manifest holds one."""
_CLUSTER_WIDE = {"Namespace", "ClusterQueue", "ResourceFlavor", "ClusterRole", "ClusterRoleBinding", "PriorityClass"}
_PINNED = re.compile(
    r"[^@]+:(?!latest$|main$|nightly$)[A-Za-z0-9_][\w.-]*(@sha256:[0-9a-f]{64})?|.+@sha256:[0-9a-f]{64}"
)
_SECRET_NAME = re.compile(r"(?i)(key|token|secret|password|credential)s?$")


def pod_findings(manifests: list[Manifest], context: list[Manifest]) -> list[Finding]:
    """What is wrong with pods and what they refer to.

    Args:
        context: manifests that are there besides, which may be referred to.
    """
    there = [*manifests, *context]
    found = []
    for pod in pod_templates(manifests):
        rules = (_pod_security, _tokens, _volumes, _references)
        found += [Finding(pod.where, said) for rule in rules for said in rule(pod, there)]
        for container in pod.containers:
            where = f"{pod.where} container {container.get('name')}"
            found += [Finding(where, said) for said in _container(container)]
        if pod.group is not None:
            found += [Finding(pod.where, said) for said in _ray_container(pod)]
        if pod.node == "head":
            found += [Finding(pod.where, said) for said in _head(pod)]
    found += [finding for manifest in manifests for finding in _object(manifest)]
    running = [pod.labels_when_it_runs for pod in pod_templates(there)]
    return found + [finding for manifest in manifests for finding in _selector(manifest, running)]


def _selector(manifest: Manifest, running: list[dict[str, str]]) -> Iterator[Finding]:
    spec = manifest.get("spec") or {}
    if manifest["kind"] == "Service":
        selector = {"matchLabels": spec.get("selector") or {}}
    elif manifest["kind"] in ("PodDisruptionBudget", "PodMonitor"):
        selector = spec.get("selector") or {}
    else:
        return
    if not any(selects(selector, labels) for labels in running):
        yield Finding(title(manifest), f"selects none of our pods: {selector}")


def _object(manifest: Manifest) -> Iterator[Finding]:
    kind, spec = manifest["kind"], manifest.get("spec") or {}
    namespace = manifest["metadata"].get("namespace")
    if kind not in _CLUSTER_WIDE and namespace != NAMESPACE:
        yield Finding(title(manifest), f"namespace is {namespace} and everything of ours is in {NAMESPACE}")
    if kind == "Secret":
        yield Finding(title(manifest), "a secret in a manifest is none: make it on the cluster, as the README says")
    if kind == "Service" and spec.get("type", "ClusterIP") != "ClusterIP":
        yield Finding(title(manifest), f"type {spec['type']} opens it to the outside: use ClusterIP, and the gateway")
    if kind == "Ingress":
        yield Finding(title(manifest), "an Ingress beside the gateway: let the component gateway be the only way in")
    if kind == "Namespace":
        labels = manifest["metadata"].get("labels") or {}
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            yield Finding(title(manifest), "label pod-security.kubernetes.io/enforce is not restricted")


def _pod_security(pod: PodTemplate, there: list[Manifest]) -> Iterator[str]:
    security = pod.spec.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "securityContext: runAsNonRoot true and a runAsUser other than 0 are wanted"
    if (security.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield "securityContext.seccompProfile.type is not RuntimeDefault"
    for name in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        if pod.spec.get(name):
            yield f"{name} is set"


def _tokens(pod: PodTemplate, there: list[Manifest]) -> Iterator[str]:
    scales = pod.node == "head" and pod.cluster.get("enableInTreeAutoscaling")
    if pod.spec.get("automountServiceAccountToken") is not bool(scales):
        yield (
            f"automountServiceAccountToken is not {str(bool(scales)).lower()}: the head whose cluster scales has a "
            "token, and no other pod"
        )
    account = pod.spec.get("serviceAccountName")
    accounts = {a["metadata"]["name"] for a in of_kind(there, "ServiceAccount")}
    if account not in accounts:
        yield f"serviceAccountName {account} is none of {', '.join(sorted(accounts))}"


def _volumes(pod: PodTemplate, there: list[Manifest]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes") or []}
    for name, volume in volumes.items():
        if "hostPath" in volume:
            yield f"volume {name} is a hostPath"
        if "emptyDir" in volume and not (volume["emptyDir"] or {}).get("sizeLimit"):
            yield f"volume {name}: emptyDir without sizeLimit may fill the node's disk"
    for container in pod.containers:
        mounts = container.get("volumeMounts") or []
        claimed = {claim["metadata"]["name"] for claim in _claim_templates(pod.owner)}
        for mount in mounts:
            if mount["name"] not in volumes.keys() | claimed:
                yield f"container {container['name']} mounts volume {mount['name']}, which there is none of"
        paths = [mount["mountPath"] for mount in mounts]
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            yield f"container {container['name']} mounts two volumes at {twice[0]}"


def _claim_templates(owner: Manifest) -> list[Manifest]:
    return (owner.get("spec") or {}).get("volumeClaimTemplates") or []


def _references(pod: PodTemplate, there: list[Manifest]) -> Iterator[str]:
    known = {
        "configMap": {m["metadata"]["name"] for m in of_kind(there, "ConfigMap")},
        "claim": {m["metadata"]["name"] for m in of_kind(there, "PersistentVolumeClaim")},
        "secret": SECRETS,
    }
    for kind, name in _referred(pod):
        if name not in known[kind]:
            yield f"{kind} {name} is not there: {', '.join(sorted(known[kind])) or 'there are none'}"


def _referred(pod: PodTemplate) -> Iterator[tuple[str, str]]:
    for volume in pod.spec.get("volumes") or []:
        if "configMap" in volume:
            yield "configMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "claim", volume["persistentVolumeClaim"]["claimName"]
    extra = (pod.cluster.get("autoscalerOptions") or {}) if pod.node == "head" else {}
    for container in [*pod.containers, extra]:
        for source in container.get("envFrom") or []:
            for kind in ("configMap", "secret"):
                if f"{kind}Ref" in source:
                    yield kind, source[f"{kind}Ref"]["name"]
        for entry in container.get("env") or []:
            for kind in ("configMap", "secret"):
                if f"{kind}KeyRef" in (entry.get("valueFrom") or {}):
                    yield kind, entry["valueFrom"][f"{kind}KeyRef"]["name"]


def _container(container: dict[str, Any]) -> Iterator[str]:
    yield from _container_security(container.get("securityContext") or {})
    yield from _resources(container.get("resources") or {})
    if not _PINNED.fullmatch(str(container.get("image") or "")):
        yield f"image {container.get('image')} is not pinned: give a version's tag or a digest"
    for port in container.get("ports") or []:
        if "hostPort" in port:
            yield f"hostPort {port['hostPort']} opens the node"
    for entry in container.get("env") or []:
        if _SECRET_NAME.search(entry["name"]) and "value" in entry:
            yield f"environment variable {entry['name']} is written down: take it from a secret by valueFrom"


def _container_security(security: dict[str, Any]) -> Iterator[str]:
    if security.get("privileged"):
        yield "privileged"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "securityContext.allowPrivilegeEscalation is not false"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "securityContext.readOnlyRootFilesystem is not true"
    capabilities = security.get("capabilities") or {}
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield "securityContext.capabilities: drop ALL, and add none"
    if security.get("runAsUser") == 0 or security.get("runAsNonRoot") is False:
        yield "runs as root"


def _resources(resources: dict[str, Any]) -> Iterator[str]:
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for name in ("cpu", "memory"):
        if name not in limits or name not in requests:
            yield f"resources: {name} has no {'limit' if name not in limits else 'request'}"
    if requests and limits and requests != limits:
        yield "resources: requests and limits differ: Ray plans by limits, and what is planned must be there"


def _ray_container(pod: PodTemplate) -> Iterator[str]:
    first = pod.spec.get("containers", [{}])[0]
    for probe in ("startupProbe", "livenessProbe"):
        if probe not in first:
            yield f"Ray's container has no {probe}"
    if "readinessProbe" not in first and pod.owner["kind"] != "RayCluster":
        yield "Ray's container has no readinessProbe"
    writable = {m["mountPath"] for m in first.get("volumeMounts") or [] if not m.get("readOnly")}
    if lacking := sorted({"/tmp", "/dev/shm"} - writable):
        yield f"nothing is mounted at {lacking[0]}, where Ray writes, and the root is read-only"
        return
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes") or []}
    name = next(m["name"] for m in first["volumeMounts"] if m["mountPath"] == "/dev/shm")
    room = quantity(((volumes.get(name) or {}).get("emptyDir") or {}).get("sizeLimit", "0"))
    said = str(((pod.group or {}).get("rayStartParams") or {}).get("object-store-memory", "0"))
    store = int(said) if said.isdigit() else 0
    if not 0 < store < room:
        yield (
            f"rayStartParams.object-store-memory {store or 'is not set and'} does not fit into the {room:.0f} bytes of "
            "/dev/shm: Ray would keep its objects on disk"
        )
    if room >= quantity(((first.get("resources") or {}).get("limits") or {}).get("memory", "0")):
        yield "/dev/shm is as large as the pod's memory, of which it is a part"


def quantity(text: str) -> float:
    """Bytes of an amount of memory as Kubernetes writes it, such as `4Gi`, `500M` or `1000`."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])(i?))?", text)
    if number is None:
        return math.nan
    power = "KMGT".index(number[2]) + 1 if number[2] else 0
    return float(number[1]) * math.pow(1024 if number[3] else 1000, power)


def _head(pod: PodTemplate) -> Iterator[str]:
    group = pod.group or {}
    if group.get("serviceType", "ClusterIP") != "ClusterIP":
        yield f"serviceType {group['serviceType']} opens Ray's dashboard: use ClusterIP"
    if group.get("enableIngress"):
        yield "enableIngress opens Ray's dashboard"
    options = pod.cluster.get("autoscalerOptions") or {}
    if pod.cluster.get("enableInTreeAutoscaling"):
        for said in (
            *_container_security(options.get("securityContext") or {}),
            *_resources(options.get("resources") or {}),
        ):
            yield f"the autoscaler's container (autoscalerOptions): {said}"
