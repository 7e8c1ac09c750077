"""Faults planted in manifests, one at a time: each is found, and what is said of it names it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.k8s.manifests import Manifest
from cluster.k8s.render import Target, render
from cluster.k8s.validation import validate
from tests.cluster.k8s.conftest import ROOT, Rendered, one

Change = Callable[[Manifest], Any]


@dataclass(frozen=True)
class Fault:
    """A change to one object, and what must be said of it."""

    name: str
    kind: str
    change: Change
    said: str
    object_name: str | None = None


def _set(path: str, value: Any) -> Change:
    """Set a value by a path such as `spec.workerGroupSpecs.0.replicas`."""

    def change(manifest: Manifest) -> None:
        *parents, leaf = path.split(".")
        there: Any = manifest
        for part in parents:
            there = there[int(part) if isinstance(there, list) else part]
        there[int(leaf) if isinstance(there, list) else leaf] = value

    return change


def _remove(path: str) -> Change:
    def change(manifest: Manifest) -> None:
        *parents, leaf = path.split(".")
        there: Any = manifest
        for part in parents:
            there = there[int(part) if isinstance(there, list) else part]
        del there[int(leaf) if isinstance(there, list) else leaf]

    return change


def _serve(before: str, after: str) -> Change:
    def change(manifest: Manifest) -> None:
        text = manifest["spec"]["serveConfigV2"]
        assert before in text
        manifest["spec"]["serveConfigV2"] = text.replace(before, after)

    return change


CLUSTER = "spec.rayClusterConfig"
HEAD, INGRESS, VISION, AUDIO, TEXT = (
    f"{CLUSTER}.headGroupSpec",
    *(f"{CLUSTER}.workerGroupSpecs.{index}" for index in range(4)),
)
POD, RAY = "template.spec", "template.spec.containers.0"

OF_THE_SERVICE = [
    # resources and their names
    Fault("a resource misspelt", "RayService", _set(f"{VISION}.resources", {"CPU": "0", "vison": "1"}), "'vison'"),
    Fault("a resource of another modality", "RayService", _set(f"{AUDIO}.resources.vision", "1"), "should be audio: 1"),
    Fault("CPUs offered by models' pods", "RayService", _set(f"{TEXT}.resources.CPU", "8"), "should offer 0"),
    Fault("CPUs offered by the head", "RayService", _set(f"{HEAD}.resources.CPU", "4"), "should offer 0"),
    Fault("a limit that is missing", "RayService", _remove(f"{TEXT}.{RAY}.resources.limits.memory"), "no limit"),
    Fault("a request that is missing", "RayService", _remove(f"{TEXT}.{RAY}.resources.requests.cpu"), "no request"),
    Fault("a request below the limit", "RayService", _set(f"{TEXT}.{RAY}.resources.requests.memory", "1Gi"), "differ"),
    Fault(
        "another limit than the role's",
        "RayService",
        _set(
            f"{VISION}.{RAY}.resources",
            {
                "requests": {"cpu": "2", "memory": "16Gi", "nvidia.com/gpu": 1},
                "limits": {"cpu": "2", "memory": "16Gi", "nvidia.com/gpu": 1},
            },
        ),
        "modalities.py says cpu 4",
    ),
    Fault(
        "a GPU that is missing",
        "RayService",
        _set(
            f"{TEXT}.{RAY}.resources",
            {"requests": {"cpu": "8", "memory": "48Gi"}, "limits": {"cpu": "8", "memory": "48Gi"}},
        ),
        "0 GPUs",
    ),
    Fault("a group of no role", "RayService", _set(f"{VISION}.groupName", "pictures"), "none of the roles"),
    Fault("a group too small", "RayService", _set(f"{VISION}.maxReplicas", 1), "would wait for ever"),
    Fault(
        "a group that never goes",
        "RayService",
        lambda m: (_set(f"{AUDIO}.minReplicas", 1)(m), _set(f"{AUDIO}.replicas", 1)(m)),
        "set minReplicas 0",
    ),
    Fault(
        "no pod for the LM",
        "RayService",
        lambda m: (_set(f"{TEXT}.minReplicas", 0)(m), _set(f"{TEXT}.replicas", 0)(m)),
        "too few pods",
    ),
    Fault(
        "no LM to ask",
        "RayService",
        _serve("{min_replicas: 1, max_replicas: 4, target_tokens", "{min_replicas: 0, max_replicas: 4, target_tokens"),
        "'phi.autoscaling.min_replicas': Input should be greater",
    ),
    # images and versions
    Fault(
        "an image that moves",
        "RayService",
        _set(f"{TEXT}.{RAY}.image", "registry.invalid/mmllm/text:latest"),
        "not pinned",
    ),
    Fault(
        "another role's image",
        "RayService",
        _set(f"{AUDIO}.{RAY}.image", "registry.invalid/mmllm/vision:0.1.0"),
        "not one of audio's",
    ),
    Fault("another Ray", "RayService", _set(f"{CLUSTER}.rayVersion", "2.59.0"), "images hold Ray 2.60.0"),
    # security
    Fault("privileged", "RayService", _set(f"{TEXT}.{RAY}.securityContext.privileged", True), "privileged"),
    Fault(
        "escalation",
        "RayService",
        _set(f"{TEXT}.{RAY}.securityContext.allowPrivilegeEscalation", True),
        "allowPrivilegeEscalation",
    ),
    Fault(
        "a writable root",
        "RayService",
        _remove(f"{TEXT}.{RAY}.securityContext.readOnlyRootFilesystem"),
        "readOnlyRootFilesystem",
    ),
    Fault(
        "a capability",
        "RayService",
        _set(f"{TEXT}.{RAY}.securityContext.capabilities.add", ["NET_ADMIN"]),
        "capabilities",
    ),
    Fault("root", "RayService", _set(f"{HEAD}.{POD}.securityContext.runAsUser", 0), "runAsUser"),
    Fault("no seccomp", "RayService", _remove(f"{HEAD}.{POD}.securityContext.seccompProfile"), "seccompProfile"),
    Fault("the node's network", "RayService", _set(f"{INGRESS}.{POD}.hostNetwork", True), "hostNetwork"),
    Fault("a port of the node", "RayService", _set(f"{INGRESS}.{RAY}.ports.0.hostPort", 8000), "hostPort"),
    Fault(
        "a folder of the node",
        "RayService",
        _set(f"{TEXT}.{POD}.volumes.1", {"name": "tmp", "hostPath": {"path": "/tmp"}}),
        "hostPath",
    ),
    Fault(
        "a token for a worker",
        "RayService",
        _set(f"{TEXT}.{POD}.automountServiceAccountToken", True),
        "automountServiceAccountToken",
    ),
    Fault(
        "an account that is not there",
        "RayService",
        _set(f"{TEXT}.{POD}.serviceAccountName", "default"),
        "serviceAccountName",
    ),
    Fault(
        "a secret written down",
        "RayService",
        _set(f"{TEXT}.{RAY}.env", [{"name": "HF_TOKEN", "value": "hf_x"}]),
        "written down",
    ),
    Fault(
        "the autoscaler as it likes",
        "RayService",
        _remove(f"{CLUSTER}.autoscalerOptions.securityContext"),
        "autoscaler's container",
    ),
    Fault("no token for Ray", "RayService", _set(f"{CLUSTER}.authOptions.mode", "disabled"), "authOptions.mode"),
    Fault(
        "a namespace without a standard",
        "Namespace",
        lambda m: m["metadata"]["labels"].update({"pod-security.kubernetes.io/enforce": "baseline"}),
        "not restricted",
    ),
    Fault(
        "another namespace",
        "ServiceAccount",
        _set("metadata.namespace", "default"),
        "namespace is default",
        "mmllm-worker",
    ),
    # what opens it
    Fault(
        "a budget of nobody's",
        "PodDisruptionBudget",
        _set("spec.selector.matchLabels", {"app": "text"}),
        "selects none of our pods",
        "mmllm-text",
    ),
    Fault(
        "objects on disk",
        "RayService",
        _remove(f"{TEXT}.rayStartParams.object-store-memory"),
        "keep its objects on disk",
    ),
    Fault(
        "more objects than room",
        "RayService",
        _set(f"{TEXT}.rayStartParams.object-store-memory", "9000000000"),
        "does not fit into the 4294967296 bytes",
    ),
    Fault(
        "shared memory without end",
        "RayService",
        _set(f"{HEAD}.{POD}.volumes.0.emptyDir.sizeLimit", "64Gi"),
        "as large as the pod's memory",
    ),
    Fault("a load balancer", "Service", _set("spec.type", "LoadBalancer"), "type LoadBalancer", "mmllm-redis"),
    Fault("the dashboard outside", "RayService", _set(f"{HEAD}.serviceType", "NodePort"), "serviceType NodePort"),
    Fault("everything let in", "NetworkPolicy", _set("spec.ingress", [{}]), "is let through", "ray-serving"),
    Fault(
        "the dashboard for all",
        "NetworkPolicy",
        _remove("spec.ingress.0.from"),
        "TCP 8265: is let through",
        "dashboard",
    ),
    Fault(
        "no denial",
        "NetworkPolicy",
        _set("spec.podSelector", {"matchLabels": {"app": "none"}}),
        "is let through",
        "default-deny",
    ),
    Fault(
        "the metadata service",
        "NetworkPolicy",
        _remove("spec.egress.0.to.0.ipBlock.except"),
        "metadata service",
        "https-out",
    ),
    Fault(
        "no names", "NetworkPolicy", _set("spec.egress.0.ports.0.port", 54), "DNS, UDP 53: is not let through", "dns"
    ),
    Fault(
        "workers without a head",
        "NetworkPolicy",
        _set("spec.ingress.0.ports.0.port", 6380),
        "TCP 6379: is not let",
        "ray-serving",
    ),
    Fault(
        "a gateway of nobody's",
        "NetworkPolicy",
        _set("spec.ingress.0.ports.0.port", 80),
        "TCP 8000: is not let",
        "gateway",
    ),
    # names and KubeRay's rules
    Fault("a bad name", "RayService", _set("metadata.name", "MMLLM_1"), "no DNS label"),
    Fault("a long name", "RayService", _set("metadata.name", "m" * 48), "KubeRay takes 47"),
    Fault("resources said twice", "RayService", _set(f"{VISION}.rayStartParams.num-gpus", "1"), "exclude each other"),
    Fault("the old autoscaler", "RayService", _remove(f"{CLUSTER}.autoscalerOptions.version"), "is not v2"),
    Fault("pods that restart", "RayService", _set(f"{TEXT}.{POD}.restartPolicy", "Always"), "wants Never"),
    Fault(
        "a service with a name",
        "RayService",
        _set(f"{HEAD}.headService", {"metadata": {"name": "head"}}),
        "during an upgrade",
    ),
    Fault("replicas out of bounds", "RayService", _set(f"{TEXT}.replicas", 9), "is not between"),
    Fault("proxies on the head alone", "RayService", _serve("EveryNode", "HeadOnly"), "not ready"),
    Fault("no timeout", "RayService", _remove("metadata.annotations"), "initializing-timeout"),
    Fault(
        "a password written down",
        "RayService",
        _set(f"{CLUSTER}.gcsFaultToleranceOptions.redisPassword", {"value": "x"}),
        "redisPassword",
    ),
    Fault(
        "a field misspelt", "RayService", _set(f"{CLUSTER}.enableInTreeAutoscalling", True), "enableInTreeAutoscalling"
    ),
    Fault("a value of another type", "RayService", _set(f"{TEXT}.maxReplicas", "4"), "is not of type 'integer'"),
    # the Serve config
    Fault(
        "an unknown key", "RayService", _serve("max_batch_size", "max_batchsize"), "unknown key 'clip.max_batchsize'"
    ),
    Fault(
        "a deployment said twice",
        "RayService",
        _serve("  route_prefix: /", "  deployments: []\n  route_prefix: /"),
        "'deployments'",
    ),
    Fault(
        "nobody needs a key",
        "RayService",
        _serve("access: {keys_file: /etc/mmllm/keys/keys.yaml}", "access: {}"),
        "keys_file",
    ),
    Fault(
        "keys that are not mounted", "RayService", _serve("/etc/mmllm/keys/keys.yaml", "/etc/keys.yaml"), "in no secret"
    ),
    Fault(
        "a bundle in the pod",
        "RayService",
        _serve("/var/lib/mmllm/bundles/assistant", "/opt/assistant"),
        "no claimed volume",
    ),
    Fault(
        "a replica that fits nowhere",
        "RayService",
        _serve("num_gpus: 1, resources: {text: 1}", "num_gpus: 2, resources: {text: 1}"),
        "none fits",
    ),
    Fault(
        "another application", "RayService", _serve("serve_apps.builder:app", "serve_apps.builder:build"), "import_path"
    ),
    # ends, probes and references
    Fault(
        "too short a grace",
        "RayService",
        _set(f"{TEXT}.{POD}.terminationGracePeriodSeconds", 60),
        "terminationGracePeriod",
    ),
    Fault("no drain", "RayService", _remove(f"{TEXT}.{RAY}.lifecycle"), "preStop waits 0 s"),
    Fault(
        "requests longer than drains",
        "RayService",
        _serve("request_timeout_s: 300", "request_timeout_s: 600"),
        "cut off",
    ),
    Fault("no liveness probe", "RayService", _remove(f"{TEXT}.{RAY}.livenessProbe"), "no livenessProbe"),
    Fault("nowhere to write", "RayService", _remove(f"{TEXT}.{RAY}.volumeMounts.1"), "mounted at /tmp,"),
    Fault("a volume that is not there", "RayService", _remove(f"{TEXT}.{POD}.volumes.5"), "mounts volume weights"),
    Fault(
        "a claim that is not there",
        "PersistentVolumeClaim",
        _set("metadata.name", "bundles"),
        "claim mmllm-bundles",
        "mmllm-bundles",
    ),
    Fault(
        "settings that are not there",
        "RayService",
        _set(f"{TEXT}.{RAY}.envFrom.0.configMapRef.name", "settings"),
        "configMap settings",
    ),
    Fault("a disk to fill", "RayService", _set(f"{TEXT}.{POD}.volumes.1.emptyDir", {}), "sizeLimit"),
    Fault("a gateway that gives up", "HTTPRoute", _set("spec.rules.0.timeouts.request", "60s"), "not above", "mmllm"),
    Fault(
        "a route to nowhere",
        "HTTPRoute",
        _set("spec.rules.0.backendRefs.0.port", 8265),
        "no service of Serve's",
        "mmllm",
    ),
]
OF_A_JOB = [
    Fault(
        "a cluster that stays", "RayJob", _set("spec.shutdownAfterJobFinishes", False), "needs shutdownAfterJobFinishes"
    ),
    Fault("no cluster", "RayJob", _remove("spec.rayClusterSpec"), "rayClusterSpec and clusterSelector"),
    Fault("below zero", "RayJob", _set("spec.backoffLimit", -1), "backoffLimit"),
    Fault("nothing to do", "RayJob", _set("spec.entrypoint", " "), "entrypoint"),
    Fault(
        "a queue and an autoscaler",
        "RayJob",
        lambda m: (
            _set("spec.rayClusterSpec.enableInTreeAutoscaling", True)(m),
            m["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "q"}),
        ),
        "Kueue",
    ),
    Fault(
        "a submitter as root",
        "RayJob",
        _set("spec.submitterPodTemplate.spec.securityContext.runAsUser", 0),
        "runAsUser",
    ),
    Fault(
        "another's network",
        "RayJob",
        lambda m: m["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["metadata"]["labels"].update(
            {"app.kubernetes.io/instance": "serving"}
        ),
        "should be training",
    ),
]


@pytest.mark.lengthy
@pytest.mark.parametrize("fault", OF_THE_SERVICE, ids=lambda fault: fault.name)
def test_a_fault_of_the_service_is_found(rendered: Rendered, crds: Path, fault: Fault) -> None:
    manifests = rendered("prod-gpu")
    fault.change(one(manifests, fault.kind, fault.object_name))
    assert fault.said in "\n".join(str(finding) for finding in validate(manifests, crds=crds))


@pytest.mark.parametrize("fault", OF_A_JOB, ids=lambda fault: fault.name)
def test_a_fault_of_a_job_is_found(rendered: Rendered, crds: Path, fault: Fault) -> None:
    manifests = rendered("jobs/instruct")
    fault.change(one(manifests, fault.kind))
    found = validate(manifests, context=render(Target(ROOT / "base", ROOT)), crds=crds)
    assert fault.said in "\n".join(str(finding) for finding in found)


def test_a_secret_in_the_manifests_is_found(rendered: Rendered, crds: Path) -> None:
    manifests = rendered("dev-cpu")
    manifests.append(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "mmllm-ray-token", "namespace": "mmllm"}}
    )
    assert "a secret in a manifest is none" in str(validate(manifests, crds=crds))
