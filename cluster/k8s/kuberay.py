"""The rules of KubeRay's operator that its schemas do not say, as its 1.7 checks them when it reconciles.

A manifest that breaks one is taken by the API server, and then nothing happens but an event. Source:
kuberay/ray-operator/controllers/ray/utils/validation.go, and Ray's reader of the same objects.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from cluster.k8s.manifests import Finding, Manifest, PodTemplate, pod_templates, ray_cluster, title

_LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 47}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_DURATION = re.compile(r"(\d+(\.\d+)?(ns|us|µs|ms|s|m|h))+|\d+")
_QUEUE = "kueue.x-k8s.io/queue-name"


def kuberay_findings(manifests: list[Manifest]) -> list[Finding]:
    """What the operator would refuse, or never get ready."""
    found = []
    for manifest in manifests:
        if manifest["apiVersion"].startswith("ray.io/"):
            where = title(manifest)
            found += [Finding(where, said) for said in _name(manifest)]
            if cluster := ray_cluster(manifest):
                found += [Finding(cluster[1], said) for said in _cluster(manifest, cluster[0])]
            if manifest["kind"] == "RayService":
                found += [Finding(where, said) for said in _service(manifest)]
            if manifest["kind"] == "RayJob":
                found += [Finding(where, said) for said in _job(manifest)]
    for pod in pod_templates(manifests):
        if pod.group is not None:
            found += [Finding(pod.where, said) for said in _group(pod)]
    return found


def _name(manifest: Manifest) -> Iterator[str]:
    name, kind = str(manifest["metadata"].get("name") or ""), manifest["kind"]
    if not _DNS_1035.fullmatch(name):
        yield f"name '{name}' is no DNS label: lower-case letters, digits and -, and a letter first"
    if len(name) > (longest := _LONGEST_NAME.get(kind, 47)):
        yield f"name '{name}' has {len(name)} characters, and KubeRay takes {longest} for a {kind}"


def _cluster(manifest: Manifest, cluster: dict[str, Any]) -> Iterator[str]:
    scales = bool(cluster.get("enableInTreeAutoscaling"))
    options = cluster.get("autoscalerOptions") or {}
    if scales and options.get("version") != "v2":
        yield "autoscalerOptions.version is not v2: the first autoscaler does not know groups' idle timeouts"
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches Ray's ports may run code"
    elif not (cluster.get("authOptions") or {}).get("secretName"):
        yield "authOptions.secretName is not set: KubeRay would make a token for each cluster, which jobs cannot know"
    version = str(cluster.get("rayVersion") or "")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or (int(numbers[1]), int(numbers[2])) < (2, 52):
        yield f"rayVersion '{version}': authOptions.mode token needs it, and 2.52 or later"
    names = [group.get("groupName") for group in cluster.get("workerGroupSpecs") or []]
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        yield f"two worker groups are called '{twice[0]}'"
    head = (cluster.get("headGroupSpec") or {}).get("template") or {}
    first = ((head.get("spec") or {}).get("containers") or [{}])[0]
    names_set = {entry.get("name") for entry in first.get("env") or []}
    redis = cluster.get("gcsFaultToleranceOptions")
    if "RAY_enable_autoscaler_v2" in names_set:
        yield "RAY_enable_autoscaler_v2 is set on the head: say autoscalerOptions.version alone"
    if mine := sorted({"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"} & names_set):
        yield f"{mine[0]} is set on the head: say it in gcsFaultToleranceOptions alone"
    if redis is not None and redis.get("backend", "redis") == "redis" and not redis.get("redisAddress"):
        yield "gcsFaultToleranceOptions.redisAddress is not set"
    if redis is not None and "value" in (redis.get("redisPassword") or {}):
        yield "gcsFaultToleranceOptions.redisPassword is written down: take it from a secret by valueFrom"
    if manifest["metadata"].get("annotations", {}).get("ray.io/ft-enabled") and redis is not None:
        yield "the annotation ray.io/ft-enabled and gcsFaultToleranceOptions exclude each other: leave the first out"
    if scales and _QUEUE in (manifest["metadata"].get("labels") or {}):
        yield f"label {_QUEUE}: Kueue takes no cluster with enableInTreeAutoscaling"


def _group(pod: PodTemplate) -> Iterator[str]:
    group, params = pod.group or {}, (pod.group or {}).get("rayStartParams") or {}
    offered = group.get("resources") or {}
    if not pod.spec.get("containers"):
        yield "has no container"
    if offered and (both := [name for name in _START_RESOURCES if params.get(name)]):
        yield f"resources and rayStartParams.{both[0]} exclude each other: say it in resources"
    if "labels" in params:
        yield "rayStartParams.labels is refused: use the group's labels"
    if (text := params.get("resources")) is not None and not _is_quoted_json(text):
        yield f'rayStartParams.resources {text}: quote it as \'"{{\\"vision\\": 1}}"\', or use the group\'s resources'
    if pod.cluster.get("enableInTreeAutoscaling"):
        if pod.spec.get("restartPolicy") not in (None, "Never"):
            yield f"restartPolicy {pod.spec['restartPolicy']}: autoscaler v2 wants Never, or none"
        if group.get("suspend"):
            yield "suspend does not go with enableInTreeAutoscaling"
    if pod.node == "head":
        if (group.get("headService") or {}).get("metadata", {}).get("name"):
            yield "headService.metadata.name is set: two clusters could not be there during an upgrade"
        return
    least, most, now = (group.get(name) for name in ("minReplicas", "maxReplicas", "replicas"))
    if least is None or most is None or least > most:
        yield f"minReplicas {least} and maxReplicas {most}: both are wanted, in this order"
    elif not least <= (now if now is not None else least) <= most:
        yield f"replicas {now} is not between minReplicas {least} and maxReplicas {most}"


def _is_quoted_json(text: str) -> bool:
    try:
        value = json.loads(text[1:-1].replace("\\", ""))
    except ValueError:
        return False
    return text[:1] == '"' == text[-1:] and isinstance(value, dict) and all(isinstance(n, int) for n in value.values())


def _service(manifest: Manifest) -> Iterator[str]:
    spec = manifest["spec"]
    annotations = manifest["metadata"].get("annotations") or {}
    timeout = str(annotations.get("ray.io/initializing-timeout", ""))
    if not _DURATION.fullmatch(timeout) or not re.search("[1-9]", timeout):
        yield "annotation ray.io/initializing-timeout is no duration such as 30m: a failed start goes on for ever"
    for name in ("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"):
        if name in spec:
            yield f"{name} is read by KubeRay no more: leave it out"
    upgrade = spec.get("upgradeStrategy") or {}
    kinds = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
    if upgrade.get("type") not in (None, *kinds):
        yield f"upgradeStrategy.type {upgrade['type']} is none of {', '.join(kinds)}"
    if upgrade.get("type") == kinds[1]:
        options = upgrade.get("clusterUpgradeOptions") or {}
        if not (spec.get("rayClusterConfig") or {}).get("enableInTreeAutoscaling"):
            yield "upgradeStrategy NewClusterWithIncrementalUpgrade needs enableInTreeAutoscaling"
        if not options.get("gatewayClassName"):
            yield "clusterUpgradeOptions.gatewayClassName is not set"
        for name in ("stepSizePercent", "maxSurgePercent"):
            if not 0 <= options.get(name, -1 if name == "stepSizePercent" else 100) <= 100:
                yield f"clusterUpgradeOptions.{name} is not between 0 and 100"
        if options.get("intervalSeconds", 0) <= 0:
            yield "clusterUpgradeOptions.intervalSeconds is not above 0"
    try:
        serve = yaml.safe_load(spec.get("serveConfigV2") or "")
    except yaml.YAMLError as error:
        yield f"serveConfigV2 is not valid YAML: {' '.join(str(error).split())}"
        return
    if isinstance(serve, dict) and serve.get("proxy_location", "EveryNode") != "EveryNode":
        yield f"serveConfigV2: proxy_location {serve['proxy_location']} leaves workers not ready: use EveryNode"


def _job(manifest: Manifest) -> Iterator[str]:
    spec = manifest["spec"]
    if (spec.get("rayClusterSpec") is None) == (not spec.get("clusterSelector")):
        yield "one of rayClusterSpec and clusterSelector is wanted"
    ends = bool(spec.get("shutdownAfterJobFinishes"))
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is below 0"
    if spec.get("ttlSecondsAfterFinished") and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes: true"
    if not ends and not spec.get("clusterSelector"):
        yield "shutdownAfterJobFinishes is not true: the cluster would stay, and cost, when the job has ended"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is below 0"
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "backoffLimit does not go with submissionMode InteractiveMode"
    if mode == "SidecarMode" and (set_too := [n for n in ("submitterPodTemplate", "submitterConfig") if spec.get(n)]):
        yield f"{set_too[0]} does not go with submissionMode SidecarMode"
    if "activeDeadlineSeconds" in spec and spec["activeDeadlineSeconds"] <= 0:
        yield "activeDeadlineSeconds is not above 0"
    if (spec.get("deletionStrategy") or {}).get("deletionRules") and ends:
        yield "deletionStrategy.deletionRules and shutdownAfterJobFinishes exclude each other"
    if not str(spec.get("entrypoint") or "").strip():
        yield "entrypoint is empty"
