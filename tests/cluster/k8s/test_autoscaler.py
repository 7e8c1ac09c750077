"""What Ray's autoscaler makes of our manifests: its own reader of KubeRay's objects, its scheduler, and its provider.

The code is what KubeRay runs beside the head; only the API server is played.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive
from ray.autoscaler._private.kuberay.node_provider import IKubernetesHttpApiClient
from ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider import KubeRayProvider
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import NodeState, NodeStatus, ResourceRequest
from ray.core.generated.instance_manager_pb2 import Instance
from ray.scripts.scripts import start as ray_start

from cluster.k8s.agreement import read_serve_config
from cluster.k8s.manifests import Manifest, pod_templates
from cluster.modalities import ROLES
from tests.cluster.k8s.conftest import Rendered, one

OVERLAYS = [("dev-cpu", ()), ("staging", ()), ("prod-gpu", ()), ("prod-gpu", ("vllm",)), ("dev-cpu", ("gpu",))]
Demand = Mapping[str, float]


def cluster_of(service: Manifest) -> Manifest:
    """The RayCluster that KubeRay makes of a RayService."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "mmllm-a1b2c", "namespace": service["metadata"]["namespace"]},
        "spec": copy.deepcopy(service["spec"]["rayClusterConfig"]),
    }


def demand_of(service: Manifest, role: str) -> dict[str, float]:
    """What a replica of a role's deployment asks Ray for."""
    config = getattr(read_serve_config(service)[1], ROLES[role].field)  # type: ignore[index, arg-type]
    options = config.ray_actor_options
    asked = {"CPU": options.num_cpus, "GPU": options.num_gpus, **options.resources}
    return {name: amount for name, amount in asked.items() if amount > 0}


def schedule(cluster: Manifest, demands: list[Demand], nodes: Mapping[str, int] | None = None) -> SchedulingReply:
    """Let Ray decide which nodes a cluster needs.

    Args:
        demands: of actors that wait.
        nodes: how many there are already of each worker group, all of them full; those that are to stay, if not given.
    """
    config = AutoscalingConfig(derive(cluster), skip_content_hash=True)
    types = config.get_node_type_configs()
    have = {name: kind.min_worker_nodes for name, kind in types.items()} if nodes is None else dict(nodes)
    have["headgroup"] = 1
    instances = []
    for name, count in have.items():
        for index in range(count):
            total = {key: value for key, value in types[name].resources.items() if value}
            # Full, but for what Ray itself never fills: memory.
            free = {key: 0.0 for key in total if key != "memory"} | {"memory": total.get("memory", 0)}
            node = NodeState(
                node_id=f"{name}-{index}".encode(),
                ray_node_type_name=name,
                total_resources=total,
                available_resources=free,
                status=NodeStatus.RUNNING,
                idle_duration_ms=0,
            )
            instance = Instance(
                instance_id=f"{name}-{index}",
                instance_type=name,
                status=Instance.RAY_RUNNING,
                node_id=f"{name}-{index}",
                cloud_instance_id=f"{name}-{index}",
            )
            instances.append(
                AutoscalerInstance(ray_node=node, im_instance=instance, cloud_instance_id=f"{name}-{index}")
            )
    requests = [ResourceRequest(resources_bundle=dict(demand)) for demand in demands]
    return ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
            current_instances=instances,
        )
    )


def launched(reply: SchedulingReply) -> dict[str, int]:
    """How many nodes of each group it wants to launch."""
    counts: Counter[str] = Counter()
    for launch in reply.to_launch:
        counts[launch.instance_type] += launch.count
    return dict(counts)


@pytest.mark.parametrize(("overlay", "components"), OVERLAYS)
def test_rays_own_reader_finds_the_groups_and_what_they_offer(
    rendered: Rendered, overlay: str, components: tuple[str, ...]
) -> None:
    service = one(rendered(overlay, *components), "RayService")
    types = derive(cluster_of(service))["available_node_types"]
    assert types.keys() == {"headgroup", "ingress", "vision", "audio", "text"}
    for role in ("vision", "audio", "text"):
        custom = {k: v for k, v in types[role]["resources"].items() if k in ("vision", "audio", "text")}
        assert custom == {role: 1}
        assert types[role]["resources"]["CPU"] == 0
    assert types["vision"]["min_workers"] == types["audio"]["min_workers"] == 0
    assert types["text"]["min_workers"] >= 1
    assert types["ingress"]["min_workers"] >= 1
    assert types["headgroup"]["resources"]["CPU"] == 0


@pytest.mark.parametrize(("overlay", "components"), OVERLAYS)
def test_replicas_start_nodes_of_their_own_modality_and_no_other(
    rendered: Rendered, overlay: str, components: tuple[str, ...]
) -> None:
    service = one(rendered(overlay, *components), "RayService")
    cluster = cluster_of(service)
    clip, whisper, phi = (demand_of(service, role) for role in ("vision", "audio", "text"))
    assert whisper["audio"] == 0.5
    assert launched(schedule(cluster, [clip] * 2)) == {"vision": 2}
    assert launched(schedule(cluster, [whisper])) == {"audio": 1}
    assert launched(schedule(cluster, [whisper] * 2)) == {"audio": 1}
    assert launched(schedule(cluster, [whisper] * 3)) == {"audio": 2}
    assert launched(schedule(cluster, [phi])) == {"text": 1}
    assert launched(schedule(cluster, [clip, whisper, phi])) == {"vision": 1, "audio": 1, "text": 1}
    assert launched(schedule(cluster, [demand_of(service, "ingress")])) == {"ingress": 1}


@pytest.mark.parametrize(("overlay", "components"), OVERLAYS)
def test_every_replica_that_the_config_allows_finds_a_node(
    rendered: Rendered, overlay: str, components: tuple[str, ...]
) -> None:
    """From nothing but the head to all deployments at their most."""
    service = one(rendered(overlay, *components), "RayService")
    config = read_serve_config(service)[1]
    demands = [
        demand_of(service, name)
        for name, role in ROLES.items()
        if role.field
        for _ in range(getattr(config, role.field).max_replicas)
    ]
    reply = schedule(cluster_of(service), demands, nodes={})
    assert not reply.infeasible_resource_requests
    most = {group["groupName"]: group["maxReplicas"] for group in cluster_of(service)["spec"]["workerGroupSpecs"]}
    assert all(0 < count <= most[name] for name, count in launched(reply).items())
    assert launched(reply).keys() == most.keys()


@pytest.mark.parametrize("target", ["prod-gpu", "jobs/instruct"])
def test_ray_start_takes_what_its_pods_are_started_with(rendered: Rendered, target: str) -> None:
    known = {name.removeprefix("--") for option in ray_start.params for name in option.opts}
    for pod in pod_templates(rendered(target)):
        for name, value in ((pod.group or {}).get("rayStartParams") or {}).items():
            assert name in known
            ray_start.make_context("start", [f"--{name}={value}"])  # a value of its type


def test_a_misspelt_resource_is_infeasible_and_starts_nothing(rendered: Rendered) -> None:
    service = one(rendered("prod-gpu"), "RayService")
    reply = schedule(cluster_of(service), [{"vison": 1.0, "GPU": 1.0}])
    assert launched(reply) == {}
    assert [dict(r.resources_bundle) for r in reply.infeasible_resource_requests] == [{"vison": 1.0, "GPU": 1.0}]


def test_more_replicas_than_nodes_allowed_wait(rendered: Rendered) -> None:
    service = one(rendered("dev-cpu"), "RayService")
    reply = schedule(cluster_of(service), [demand_of(service, "vision")] * 3)
    assert launched(reply) == {"vision": 2}
    assert len(reply.infeasible_resource_requests) == 1


def test_the_development_cluster_starts_with_its_head_alone(rendered: Rendered) -> None:
    cluster = one(rendered("dev-cpu"), "RayCluster")
    assert launched(schedule(cluster, [])) == {}
    assert all(kind.get("min_workers", 0) == 0 for kind in derive(cluster)["available_node_types"].values())
    assert launched(schedule(cluster, [{"text": 1.0}])) == {"text": 1}


class ApiServer(IKubernetesHttpApiClient):
    """Holds one RayCluster and its pods, and remembers the patches that it is sent."""

    def __init__(self, cluster: Manifest, workers: list[tuple[str, str]]) -> None:
        self.cluster = cluster
        self.patches: list[tuple[str, Any]] = []
        pods = [("head", "head", "headgroup"), *((name, "worker", group) for name, group in workers)]
        self.pods = [
            {
                "metadata": {"name": name, "labels": {"ray.io/node-type": kind, "ray.io/group": group}},
                "spec": {"containers": [{"name": "ray", "resources": {}}]},
                "status": {"containerStatuses": [{"name": "ray", "state": {"running": {}}}]},
            }
            for name, kind, group in pods
        ]

    def get(self, path: str) -> dict[str, Any]:
        """As the API server answers it."""
        if path == f"rayclusters/{self.cluster['metadata']['name']}":
            return copy.deepcopy(self.cluster)
        if path.startswith("pods?labelSelector=ray.io/cluster"):
            return {"metadata": {"resourceVersion": "1"}, "items": copy.deepcopy(self.pods)}
        assert path.startswith("pods/"), path
        return {"metadata": {"resourceVersion": "1"}}

    def patch(self, path: str, payload: Any, content_type: str = "application/json-patch+json") -> dict[str, Any]:
        """Remembered, and applied where it changes a number of replicas."""
        self.patches.append((path, payload))
        return {}

    def delete(self, path: str) -> dict[str, Any]:
        """Never asked for."""
        raise AssertionError(path)


def _provider(server: ApiServer) -> KubeRayProvider:
    return KubeRayProvider("mmllm-a1b2c", {"namespace": "mmllm"}, gcs_client=None, k8s_api_client=server)


def test_the_provider_patches_the_group_that_is_to_grow(rendered: Rendered) -> None:
    """From what waits to the patch that the API server gets: two CLIP replicas, and nothing else changes."""
    service = one(rendered("prod-gpu"), "RayService")
    cluster = cluster_of(service)
    names = [group["groupName"] for group in cluster["spec"]["workerGroupSpecs"]]
    server = ApiServer(cluster, [("ingress-0", "ingress"), ("ingress-1", "ingress"), ("text-0", "text")])
    provider = _provider(server)
    assert {pod.node_type for pod in provider.get_non_terminated().values()} == {"headgroup", "ingress", "text"}
    provider.launch(launched(schedule(cluster, [demand_of(service, "vision")] * 2)), "request-1")
    assert provider.poll_errors() == []
    change = {"op": "replace", "path": f"/spec/workerGroupSpecs/{names.index('vision')}/replicas", "value": 2}
    assert server.patches == [("rayclusters/mmllm-a1b2c", [change])]


def test_the_provider_names_the_pod_that_is_to_go(rendered: Rendered) -> None:
    cluster = cluster_of(one(rendered("prod-gpu"), "RayService"))
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    groups["audio"]["replicas"] = 2
    server = ApiServer(cluster, [("audio-0", "audio"), ("audio-1", "audio")])
    provider = _provider(server)
    provider.terminate(["audio-1"], "request-1")
    assert provider.poll_errors() == []
    at = f"/spec/workerGroupSpecs/{list(groups).index('audio')}"
    assert server.patches == [
        (
            "rayclusters/mmllm-a1b2c",
            [
                {"op": "replace", "path": f"{at}/replicas", "value": 1},
                {"op": "replace", "path": f"{at}/scaleStrategy", "value": {"workersToDelete": ["audio-1"]}},
            ],
        )
    ]
