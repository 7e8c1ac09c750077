"""KubeRay's own rules, each on a cluster that keeps all others."""

import copy
from typing import Any

import pytest

from cluster.k8s.kuberay import kuberay_findings
from cluster.k8s.manifests import Manifest
from cluster.k8s.schemas import load_crds, with_defaults
from tests.cluster.k8s.conftest import Rendered, one

GROUP: dict[str, Any] = {
    "groupName": "vision",
    "replicas": 0,
    "minReplicas": 0,
    "maxReplicas": 2,
    "resources": {"vision": "1"},
    "rayStartParams": {},
    "template": {"spec": {"containers": [{"name": "ray", "image": "i"}]}},
}
CLUSTER: dict[str, Any] = {
    "rayVersion": "2.60.0",
    "enableInTreeAutoscaling": True,
    "autoscalerOptions": {"version": "v2"},
    "authOptions": {"mode": "token", "secretName": "t"},
    "headGroupSpec": {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "ray", "image": "i"}]}}},
    "workerGroupSpecs": [GROUP],
}


def cluster(name: str = "c", labels: dict[str, str] | None = None, **changes: Any) -> Manifest:
    """A RayCluster that is right, but for the changes."""
    spec = copy.deepcopy(CLUSTER | changes)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": spec,
    }


def group(**changes: Any) -> Manifest:
    """A RayCluster whose worker group is changed."""
    return cluster(workerGroupSpecs=[GROUP | changes])


def head(**changes: Any) -> Manifest:
    """A RayCluster whose head is changed."""
    return cluster(headGroupSpec=CLUSTER["headGroupSpec"] | changes)


def job(**changes: Any) -> Manifest:
    """A RayJob that is right, but for the changes."""
    spec = {"entrypoint": "true", "shutdownAfterJobFinishes": True, "rayClusterSpec": CLUSTER}
    spec = {key: value for key, value in (spec | changes).items() if value is not None}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "j"}, "spec": copy.deepcopy(spec)}


def pods(**changes: Any) -> dict[str, Any]:
    """A pod template."""
    return {"template": {"spec": {"containers": [{"name": "ray", "image": "i"}]} | changes}}


def environment(**variables: str) -> Manifest:
    """A cluster whose head has environment variables."""
    entries = [{"name": name, "value": value} for name, value in variables.items()]
    return head(**pods(containers=[{"name": "ray", "image": "i", "env": entries}]))


@pytest.mark.parametrize(
    "manifest",
    [
        cluster(),
        cluster("c" * 53),
        job(),
        job(ttlSecondsAfterFinished=60),
        group(resources={}, rayStartParams={"num-cpus": "1", "resources": '"{\\"vision\\": 1}"'}),
        group(**pods(restartPolicy="Never")),
        cluster(enableInTreeAutoscaling=False, labels={"kueue.x-k8s.io/queue-name": "q"}),
    ],
)
def test_what_keeps_the_rules_passes(manifest: Manifest) -> None:
    assert kuberay_findings([manifest]) == []


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (cluster("c" * 54), "has 54 characters, and KubeRay takes 53"),
        (cluster("1c"), "no DNS label"),
        (cluster("c-"), "no DNS label"),
        (group(rayStartParams={"num-cpus": "1"}), "resources and rayStartParams.num-cpus exclude each other"),
        (group(resources={}, rayStartParams={"resources": '{"vision": 1}'}), "quote it as"),
        (group(rayStartParams={"labels": "a=b"}), "rayStartParams.labels is refused"),
        (group(**pods(restartPolicy="OnFailure")), "autoscaler v2 wants Never"),
        (group(suspend=True), "suspend does not go"),
        (group(minReplicas=3), "minReplicas 3 and maxReplicas 2"),
        (group(template={"spec": {"containers": []}}), "no container"),
        (cluster(workerGroupSpecs=[GROUP, GROUP]), "two worker groups are called 'vision'"),
        (cluster(autoscalerOptions={"version": "v1"}), "is not v2"),
        (cluster(authOptions={}), "authOptions.mode is not token"),
        (cluster(authOptions={"mode": "token"}), "secretName is not set"),
        (cluster(rayVersion=""), "authOptions.mode token needs it"),
        (cluster(rayVersion="2.51.0"), "2.52 or later"),
        (environment(RAY_enable_autoscaler_v2="1"), "RAY_enable_autoscaler_v2"),
        (environment(RAY_REDIS_ADDRESS="r"), "RAY_REDIS_ADDRESS is set on the head"),
        (cluster(gcsFaultToleranceOptions={}), "redisAddress is not set"),
        (cluster(labels={"kueue.x-k8s.io/queue-name": "q"}), "Kueue takes no cluster"),
        (head(headService={"metadata": {"name": "h"}}), "headService.metadata.name"),
        (job(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=60), "needs shutdownAfterJobFinishes"),
        (job(ttlSecondsAfterFinished=-1), "below 0"),
        (job(suspend=True, shutdownAfterJobFinishes=False), "suspend needs"),
        (job(clusterSelector={"a": "b"}), "one of rayClusterSpec and clusterSelector"),
        (job(rayClusterSpec=None), "one of rayClusterSpec and clusterSelector"),
        (job(submissionMode="InteractiveMode", backoffLimit=1), "InteractiveMode"),
        (job(submissionMode="SidecarMode", submitterConfig={"backoffLimit": 1}), "SidecarMode"),
        (job(activeDeadlineSeconds=0), "activeDeadlineSeconds"),
        (job(deletionStrategy={"deletionRules": [{}]}), "exclude each other"),
    ],
)
def test_what_breaks_a_rule_is_told(manifest: Manifest, said: str) -> None:
    found = [str(finding) for finding in kuberay_findings([manifest])]
    assert len([finding for finding in found if said in finding]) == 1, found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gatewayClassName": ""}, "gatewayClassName"),
        ({"stepSizePercent": 101}, "stepSizePercent"),
        ({"intervalSeconds": 0}, "intervalSeconds"),
        ({"maxSurgePercent": -1}, "maxSurgePercent"),
    ],
)
def test_an_upgrade_by_steps_that_cannot_go_on_is_told(rendered: Rendered, options: dict[str, Any], said: str) -> None:
    service = one(rendered("dev-cpu", "incremental-upgrade"), "RayService")
    service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"].update(options)
    assert said in "\n".join(str(finding) for finding in kuberay_findings([service]))


@pytest.mark.parametrize("timeout", ["", "soon", "0", "0m", "30 m"])
def test_a_first_start_without_an_end_is_told(rendered: Rendered, timeout: str) -> None:
    service = one(rendered("dev-cpu"), "RayService")
    service["metadata"]["annotations"]["ray.io/initializing-timeout"] = timeout
    assert "initializing-timeout" in str(kuberay_findings([service])[0])


def test_a_setting_that_kuberay_reads_no_more_is_told(rendered: Rendered) -> None:
    service = one(rendered("dev-cpu"), "RayService")
    service["spec"]["serviceUnhealthySecondThreshold"] = 900
    assert "serviceUnhealthySecondThreshold is read by KubeRay no more" in str(kuberay_findings([service]))


def test_defaults_of_the_schemas_are_filled_in(crds: Any, rendered: Rendered) -> None:
    """As the API server does it before it validates: what a manifest leaves out may be required."""
    service = one(rendered("dev-cpu"), "RayService")
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    del groups[0]["minReplicas"], groups[0]["replicas"]
    filled = with_defaults(service, load_crds(crds)["RayService"])
    assert filled["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] == 0
    assert filled["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["numOfHosts"] == 1
