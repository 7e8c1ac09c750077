"""NetworkPolicies, evaluated: may these pods speak to those, at this port?

The semantics of networking.k8s.io/v1: a pod that no policy selects for a direction is open in it; one that some select
may do what any of them allows; and a flow needs both its ends to agree. Named ports, which depend on the pod that is
reached, are looked up in it. Traffic between a node and its own pods (probes, port-forward) is never held up.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.k8s.manifests import Manifest, of_kind


@dataclass(frozen=True)
class Peer:
    """One end of a flow: a pod by its labels, or a machine by its address."""

    name: str
    namespace: str | None = None
    """None for a machine outside."""
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str | None = None
    """A pod's too, where a policy goes by addresses."""
    ports: Mapping[str, int] = field(default_factory=dict)
    """Names of its ports."""

    @property
    def namespace_labels(self) -> dict[str, str]:
        """Labels that every namespace has."""
        return {"kubernetes.io/metadata.name": self.namespace} if self.namespace else {}


def allowed(policies: list[Manifest], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection from `source` to `target` at `port` comes about."""
    policies = of_kind(policies, "NetworkPolicy")
    return _agrees(policies, source, "Egress", target, target, port, protocol) and _agrees(
        policies, target, "Ingress", source, target, port, protocol
    )


def _agrees(
    policies: list[Manifest], pod: Peer, direction: str, other: Peer, target: Peer, port: int, protocol: str
) -> bool:
    if pod.namespace is None:
        return True
    selecting = [
        policy["spec"]
        for policy in policies
        if policy["metadata"].get("namespace") == pod.namespace
        and direction in _types(policy["spec"])
        and selects(policy["spec"].get("podSelector") or {}, pod.labels)
    ]
    rules = [rule for spec in selecting for rule in spec.get(direction.lower()) or []]
    peers = "to" if direction == "Egress" else "from"
    return not selecting or any(
        _at_port(rule.get("ports"), target, port, protocol) and _is_peer(rule.get(peers), other, pod.namespace)
        for rule in rules
    )


def _types(spec: dict[str, Any]) -> list[str]:
    return spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]


def _at_port(ports: list[dict[str, Any]] | None, target: Peer, port: int, protocol: str) -> bool:
    if not ports:
        return True
    for entry in ports:
        if entry.get("protocol", "TCP") != protocol:
            continue
        first = entry.get("port")
        if isinstance(first, str):
            first = target.ports.get(first)
            if first is None:
                continue
        if first is None or first <= port <= entry.get("endPort", first):
            return True
    return False


def _is_peer(peers: list[dict[str, Any]] | None, other: Peer, namespace: str) -> bool:
    if not peers:
        return True
    return any(_matches(peer, other, namespace) for peer in peers)


def _matches(peer: dict[str, Any], other: Peer, namespace: str) -> bool:
    if block := peer.get("ipBlock"):
        if other.address is None:
            return False
        address = ipaddress.ip_address(other.address)
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(hole) for hole in block.get("except") or [])
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"] or {}, other.namespace_labels):
            return False
    elif other.namespace != namespace:
        return False
    return selects(peer.get("podSelector") or {}, other.labels)


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects something with these labels; an empty one selects everything."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for entry in selector.get("matchExpressions") or []:
        value, operator = labels.get(entry["key"]), entry["operator"]
        holds = {
            "In": value is not None and value in (entry.get("values") or []),
            "NotIn": value is None or value not in (entry.get("values") or []),
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[operator]
        if not holds:
            return False
    return True
