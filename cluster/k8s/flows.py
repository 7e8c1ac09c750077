"""Who may speak to whom: the table that NetworkPolicies are held to, and its check over rendered manifests."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.k8s.manifests import INSTANCE, PART_OF, Finding, Manifest, of_kind, pod_templates
from cluster.k8s.network import Peer, allowed
from cluster.k8s.pods import NAMESPACE

GCS, RAYLET, DASHBOARD, CLIENT, SERVE, METRICS = 6379, 6380, 8265, 10001, 8000, 8080
WORKERS, AGENT = (10002, 10999), 52365
REPLICAS = ("ingress", "vision", "audio", "text")
BATCH = ("import", "embedded", "data")
"""Components of jobs without a cluster."""

_OPERATOR = Peer("operator", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}, "10.1.0.2")
_DNS = Peer("DNS", "kube-system", {"k8s-app": "kube-dns"}, "10.1.0.3")
_PROMETHEUS = Peer("Prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"}, "10.1.0.4")
_STRANGER = Peer("another namespace's pod", "default", {"app": "shell"}, "10.1.0.5")
_IMPOSTOR = Peer(
    "another namespace's pod with our labels", "default", {PART_OF: "mmllm", INSTANCE: "serving"}, "10.1.0.6"
)
_UNLABELLED = Peer("a pod of the namespace without our labels", NAMESPACE, {"app": "shell"}, "10.2.0.9")
_API_SERVER = Peer("the API server", address="10.96.0.1")
_OBJECT_STORE = Peer("an object store", address="52.218.0.1")
_METADATA = Peer("the cloud's metadata service", address="169.254.169.254")
_INTERNET = Peer("a client outside", address="203.0.113.9")


@dataclass(frozen=True)
class Flow:
    """A connection, and whether it is to come about."""

    source: Peer
    target: Peer
    port: int
    allowed: bool
    protocol: str = "TCP"


def flows(manifests: list[Manifest]) -> Iterator[Flow]:
    """The table, for the pods that some manifests make."""
    pods: dict[tuple[str, str], Peer] = {}
    for pod in pod_templates(manifests):
        if pod.owner["metadata"].get("namespace") == NAMESPACE:
            key = (pod.labels.get(INSTANCE, ""), pod.component or "")
            ports = {p["name"]: p["containerPort"] for c in pod.containers for p in c.get("ports") or [] if "name" in p}
            pods[key] = Peer("/".join(key).strip("/"), NAMESPACE, pod.labels_when_it_runs, "10.2.0.1", ports)
    instances = {instance for instance, component in pods if component == "head"}
    for instance in sorted(instances):
        mine = {component: peer for (i, component), peer in pods.items() if i == instance and component != "submitter"}
        yield from _within(mine)
        yield from _from_outside(mine)
        for component, peer in mine.items():
            yield from _out_of(peer, scales=component == "head" and instance != "training")
            for (other, name), stranger in pods.items():
                if other in instances - {instance} and name != "submitter":
                    yield Flow(stranger, peer, GCS, False)
                    yield Flow(stranger, peer, WORKERS[0], False)
    yield from _around(pods, manifests)


def _within(pods: dict[str, Peer]) -> Iterator[Flow]:
    head = pods["head"]
    for component, peer in pods.items():
        if component == "head":
            continue
        yield Flow(peer, head, GCS, True)
        yield Flow(peer, head, DASHBOARD, False)
        yield Flow(peer, head, CLIENT, False)
        yield Flow(peer, head, SERVE, False)
        for other in pods.values():  # replicas call each other, and objects go from node to node
            for port in (RAYLET, RAYLET + 3, *WORKERS, AGENT):
                yield Flow(peer, other, port, True)
                yield Flow(other, peer, port, True)
            for port in (DASHBOARD, CLIENT, SERVE):
                yield Flow(other, peer, port, False)


def _from_outside(pods: dict[str, Peer]) -> Iterator[Flow]:
    for component, peer in pods.items():
        for stranger in (_STRANGER, _IMPOSTOR, _UNLABELLED, _INTERNET):
            for port in (GCS, RAYLET, DASHBOARD, CLIENT, SERVE, METRICS, WORKERS[0], AGENT):
                yield Flow(stranger, peer, port, False)
        yield Flow(_OPERATOR, peer, DASHBOARD, component == "head")
        yield Flow(_OPERATOR, peer, SERVE, component == "head")
        yield Flow(_OPERATOR, peer, GCS, False)
        yield Flow(_PROMETHEUS, peer, SERVE, False)
        yield Flow(_PROMETHEUS, peer, DASHBOARD, False)


def _out_of(peer: Peer, *, scales: bool, plain_http: bool = False) -> Iterator[Flow]:
    yield Flow(peer, _DNS, 53, True, "UDP")
    yield Flow(peer, _DNS, 53, True)
    yield Flow(peer, _OBJECT_STORE, 443, True)
    yield Flow(peer, _OBJECT_STORE, 80, plain_http)
    yield Flow(peer, _METADATA, 80, False)
    yield Flow(peer, _METADATA, 443, False)
    yield Flow(peer, _API_SERVER, 443, scales)
    yield Flow(peer, _STRANGER, 8080, False)


def _around(pods: dict[tuple[str, str], Peer], manifests: list[Manifest]) -> Iterator[Flow]:
    gateways = _gateways(manifests)
    serving = {component: peer for (instance, component), peer in pods.items() if instance == "serving"}
    for gateway in gateways:
        for component, peer in serving.items():
            yield Flow(gateway, peer, SERVE, component in REPLICAS)
            yield Flow(gateway, peer, DASHBOARD, False)
            yield Flow(gateway, peer, GCS, False)
    if of_kind(manifests, "PodMonitor"):
        for (_, component), peer in pods.items():
            if component in (*REPLICAS, "head", "train"):
                yield Flow(_PROMETHEUS, peer, METRICS, True)
    if submitter := pods.get(("", "submitter")):
        for (instance, component), peer in pods.items():
            if instance == "training":
                yield Flow(submitter, peer, DASHBOARD, component == "head")
                yield Flow(submitter, peer, GCS, False)
                yield Flow(submitter, peer, WORKERS[0], False)
        yield Flow(submitter, _API_SERVER, 443, False)
    for (instance, component), peer in pods.items():
        if not instance and component in BATCH:
            yield from _out_of(peer, scales=False, plain_http=component == "data")
            yield Flow(_STRANGER, peer, SERVE, False)
            for head in (other for (_, name), other in pods.items() if name == "head"):
                yield Flow(peer, head, GCS, False)
                yield Flow(peer, head, DASHBOARD, False)
    if of_kind(manifests, "NetworkPolicy"):
        yield Flow(_UNLABELLED, _OBJECT_STORE, 443, False)
        yield Flow(_UNLABELLED, _DNS, 53, False, "UDP")
        yield Flow(_STRANGER, _UNLABELLED, SERVE, False)
    if redis := pods.get(("", "redis")):
        for component, peer in serving.items():
            yield Flow(peer, redis, 6379, component == "head")
        yield Flow(_STRANGER, redis, 6379, False)
        yield Flow(redis, _OBJECT_STORE, 80, False)


def _gateways(manifests: list[Manifest]) -> list[Peer]:
    names = [m["metadata"]["name"] for m in of_kind(manifests, "Gateway")]
    for service in of_kind(manifests, "RayService"):
        if (service["spec"].get("upgradeStrategy") or {}).get("type") == "NewClusterWithIncrementalUpgrade":
            names.append(f"{service['metadata']['name']}-gateway")
    label = "gateway.envoyproxy.io/owning-gateway-name"
    return [Peer(f"gateway {name}", "envoy-gateway-system", {label: name}, "10.1.0.7") for name in names]


def flow_findings(manifests: list[Manifest], context: list[Manifest]) -> list[Finding]:
    """Flows of the table that policies hold up, or let through against it.

    Args:
        context: manifests that are there besides, with their policies.
    """
    policies = of_kind([*manifests, *context], "NetworkPolicy")
    found = []
    for flow in flows([*manifests, *context]):
        if allowed(policies, flow.source, flow.target, flow.port, flow.protocol) != flow.allowed:
            said = "is not let through" if flow.allowed else "is let through, and must not be"
            at = f"{flow.protocol} {flow.port}"
            found.append(Finding("NetworkPolicies", f"{flow.source.name} -> {flow.target.name}, {at}: {said}"))
    return list(dict.fromkeys(found))
