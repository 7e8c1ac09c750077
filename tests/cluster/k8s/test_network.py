"""Who may speak to whom: the evaluator by cases of Kubernetes' documentation, and the table over what is rendered."""

from typing import Any

import pytest

from cluster.k8s.flows import flow_findings, flows
from cluster.k8s.manifests import Manifest, of_kind
from cluster.k8s.network import Peer, allowed
from tests.cluster.k8s.conftest import Rendered

DB = Peer("db", "shop", {"role": "db"}, "10.0.0.1", {"sql": 5432})
WEB = Peer("web", "shop", {"role": "web"}, "10.0.0.2")
OTHER = Peer("other", "blog", {"role": "web"}, "10.0.0.3")
HOST = Peer("host", address="203.0.113.7")


def policy(**spec: Any) -> Manifest:
    """A policy of the namespace shop for its database."""
    spec = {"podSelector": {"matchLabels": {"role": "db"}}, "policyTypes": ["Ingress"]} | spec
    return {"kind": "NetworkPolicy", "metadata": {"name": "p", "namespace": "shop"}, "spec": spec}


@pytest.mark.parametrize(
    ("policies", "source", "target", "port", "expected"),
    [
        ([], OTHER, DB, 1, True),
        ([policy()], WEB, DB, 5432, False),
        ([policy()], DB, WEB, 80, True),
        ([policy(ingress=[{}])], OTHER, DB, 5432, True),
        ([policy(ingress=[{"from": [{"podSelector": {"matchLabels": {"role": "web"}}}]}])], WEB, DB, 5432, True),
        ([policy(ingress=[{"from": [{"podSelector": {"matchLabels": {"role": "web"}}}]}])], OTHER, DB, 5432, False),
        ([policy(ingress=[{"from": [{"namespaceSelector": {}}]}])], OTHER, DB, 5432, True),
        ([policy(ingress=[{"from": [{"namespaceSelector": {}}]}])], HOST, DB, 5432, False),
        ([policy(ingress=[{"from": [{"ipBlock": {"cidr": "203.0.113.0/24"}}]}])], HOST, DB, 5432, True),
        (
            [policy(ingress=[{"from": [{"ipBlock": {"cidr": "203.0.113.0/24", "except": ["203.0.113.7/32"]}}]}])],
            HOST,
            DB,
            5432,
            False,
        ),
        ([policy(ingress=[{"ports": [{"port": "sql"}]}])], WEB, DB, 5432, True),
        ([policy(ingress=[{"ports": [{"port": "sql"}]}])], WEB, DB, 80, False),
        ([policy(ingress=[{"ports": [{"port": 5000, "endPort": 6000}]}])], WEB, DB, 5432, True),
        ([policy(ingress=[{"ports": [{"port": 5000, "endPort": 6000}]}])], WEB, DB, 6001, False),
        ([policy(ingress=[{"ports": [{"port": 5432, "protocol": "UDP"}]}])], WEB, DB, 5432, False),
        ([policy(), policy(ingress=[{"ports": [{"port": 80}]}])], WEB, DB, 80, True),  # what any allows is allowed
        ([policy(policyTypes=["Egress"])], DB, WEB, 80, False),
        ([policy(policyTypes=["Egress"], egress=[{"to": [{"podSelector": {}}]}])], DB, WEB, 80, True),
        ([policy(policyTypes=["Egress"], egress=[{"to": [{"podSelector": {}}]}])], DB, OTHER, 80, False),
        ([policy(policyTypes=["Egress"], egress=[])], WEB, DB, 5432, True),  # of the other direction
        (
            [policy(podSelector={"matchExpressions": [{"key": "role", "operator": "NotIn", "values": ["web"]}]})],
            WEB,
            DB,
            1,
            False,
        ),
        ([policy(podSelector={"matchExpressions": [{"key": "role", "operator": "DoesNotExist"}]})], WEB, DB, 1, True),
    ],
)
def test_policies_are_read_as_kubernetes_reads_them(
    policies: list[Manifest], source: Peer, target: Peer, port: int, expected: bool
) -> None:
    assert allowed(policies, source, target, port) is expected


def test_both_ends_must_agree() -> None:
    deny_egress = policy(podSelector={"matchLabels": {"role": "web"}}, policyTypes=["Egress"])
    let_in = policy(ingress=[{}])
    assert allowed([let_in], WEB, DB, 5432)
    assert not allowed([let_in, deny_egress], WEB, DB, 5432)


WITH = [
    ("dev-cpu", ()),
    ("dev-cpu", ("gateway", "gcs-ft-redis", "monitoring")),
    ("dev-cpu", ("incremental-upgrade",)),
    ("staging", ()),
    ("prod-gpu", ()),
]


@pytest.mark.parametrize(("overlay", "components"), WITH)
def test_the_table_of_flows_holds(rendered: Rendered, overlay: str, components: tuple[str, ...]) -> None:
    manifests = rendered(overlay, *components)
    assert flow_findings(manifests, []) == []
    assert len(list(flows(manifests))) > 150


def table(manifests: list[Manifest]) -> set[tuple[str, str, int, bool]]:
    """The flows that are held to, by names."""
    return {(flow.source.name, flow.target.name, flow.port, flow.allowed) for flow in flows(manifests)}


def test_the_table_says_what_is_promised(rendered: Rendered) -> None:
    """The promises of k8s/README.md, which a table that lost a line would no longer hold."""
    promised = table(rendered("prod-gpu"))
    workers = ("ingress", "vision", "audio", "text")
    for worker in (f"serving/{name}" for name in workers):
        assert ("gateway mmllm", worker, 8000, True) in promised
        assert ("serving/head", worker, 10002, True) in promised
        assert (worker, "serving/head", 6379, True) in promised
        assert (worker, "serving/head", 8265, False) in promised
        assert (worker, "DNS", 53, True) in promised
        assert (worker, "an object store", 443, True) in promised
        assert (worker, "the API server", 443, False) in promised
        assert (worker, "redis", 6379, False) in promised
        for other in workers:
            assert (worker, f"serving/{other}", 10002, True) in promised
        for stranger in ("a client outside", "another namespace's pod", "a pod of the namespace without our labels"):
            assert (stranger, worker, 8000, False) in promised
            assert (stranger, "serving/head", 8265, False) in promised
    assert ("operator", "serving/head", 8265, True) in promised
    assert ("serving/head", "redis", 6379, True) in promised
    assert ("serving/head", "the API server", 443, True) in promised


def test_without_a_gateway_nobody_reaches_the_service(rendered: Rendered) -> None:
    flows_in = [flow for flow in flows(rendered("dev-cpu")) if flow.port == 8000 and flow.target.namespace == "mmllm"]
    assert {flow.source.name for flow in flows_in if flow.allowed} == {"operator"}  # which asks a head for its health
    assert {flow.target.name for flow in flows_in if flow.allowed} == {"serving/head", "development/head"}


@pytest.mark.parametrize(
    "name", ["default-deny", "dns", "https-out", "ray-serving", "dashboard", "autoscaler", "redis"]
)
def test_no_policy_is_idle(rendered: Rendered, name: str) -> None:
    """Without any of them the table does not hold."""
    manifests = [m for m in rendered("prod-gpu") if (m["kind"], m["metadata"]["name"]) != ("NetworkPolicy", name)]
    assert len(of_kind(manifests, "NetworkPolicy")) == len(of_kind(rendered("prod-gpu"), "NetworkPolicy")) - 1
    assert flow_findings(manifests, [])


def test_a_flow_is_told_with_both_ends_and_its_port(rendered: Rendered) -> None:
    manifests = [m for m in rendered("prod-gpu") if m["metadata"]["name"] != "dns"]
    said = [str(finding) for finding in flow_findings(manifests, [])]
    assert "NetworkPolicies: serving/text -> DNS, UDP 53: is not let through" in said
