"""checkov over all pods: what it finds is explained here, finding by finding, and each explanation is needed."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.k8s.manifests import Manifest, pod_templates
from tests.cluster.k8s.conftest import Rendered

EXPLAINED = {
    "CKV_K8S_8": (
        r".*-(head|ingress|vision|audio|text|import|train|submitter)-.*",
        "containers that ship logs, and jobs",
    ),
    "CKV_K8S_9": (
        r".*-(head|ingress|vision|audio|text|import|train|submitter)-.*",
        "containers that ship logs, and jobs",
    ),
    "CKV_K8S_15": (r".*", "IfNotPresent: an image's tag is a version, which does not move"),
    "CKV_K8S_35": (
        r".*(redis|s3|head|ingress|vision|audio|text|train).*",
        "valkey, and S3's clients, read the environment",
    ),
    "CKV_K8S_38": (r"Deployment\.mmllm\.\S+-head-\d+", "the autoscaler beside the head asks the API server for pods"),
    "CKV_K8S_43": (r".*", "digests are the registry's, which a checkout does not know: `render --tag` takes a version"),
}
"""By checkov's check: which resources may be found, and why."""
TARGETS = [
    ("prod-gpu", ("log-shipping", "s3-storage", "vllm")),
    ("dev-cpu", ()),
    ("jobs/instruct", ()),
    ("jobs/import", ()),
]


def synthetic(name: str, manifests: list[Manifest]) -> list[Manifest]:
    """A Deployment for every pod template, for checkov knows none of KubeRay's kinds; and what it knows as it is."""
    made = [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": f"{name.replace('/', '-')}-{pod.component}-{number}", "namespace": "mmllm"},
            "spec": {
                "selector": {"matchLabels": pod.labels},
                "template": {"metadata": {"labels": pod.labels}, "spec": pod.spec},
            },
        }
        for number, pod in enumerate(pod_templates(manifests))
        if pod.group is not None or pod.component == "submitter"
    ]
    return made + [
        m for m in manifests if "." not in m["apiVersion"].rpartition("/")[0] or m["kind"] == "NetworkPolicy"
    ]


def scan(checkov: str, folder: Path, manifests: list[Manifest]) -> tuple[set[tuple[str, str]], int]:
    """The checks that failed, as (check, resource), and how many passed."""
    (folder / "all.yaml").write_text(yaml.safe_dump_all(manifests))
    command = [checkov, "--directory", str(folder), "--framework", "kubernetes", "--output", "json"]
    done = subprocess.run([*command, "--skip-download", "--soft-fail"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    failed = {(check["check_id"], check["resource"]) for check in found["results"]["failed_checks"]}
    return failed, int(found["summary"]["passed"])


def faulty(pod: dict[str, Any]) -> Manifest:
    """A pod with faults of many kinds."""
    changes = {"securityContext": {"privileged": True}, "resources": {}, "image": "mmllm/text:latest"}
    spec = pod | {"hostNetwork": True, "automountServiceAccountToken": True, "securityContext": {}}
    spec["containers"] = [pod["containers"][0] | changes]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "faulty", "namespace": "default"}, "spec": spec}


@pytest.mark.lengthy
def test_nothing_that_checkov_finds_is_unexplained(rendered: Rendered, tmp_path: Path) -> None:
    checkov = os.environ.get("MMLLM_TEST_CHECKOV") or shutil.which("checkov")
    if checkov is None:
        pytest.skip("no checkov, whose packages do not go with ours: name its program in MMLLM_TEST_CHECKOV")
    objects = [each for name, components in TARGETS for each in synthetic(name, rendered(name, *components))]
    text = next(each for each in objects if each["metadata"]["name"].startswith("dev-cpu-text"))
    failed, passed = scan(checkov, tmp_path, [*objects, faulty(text["spec"]["template"]["spec"])])
    planted = {check for check, at in failed if at == "Pod.default.faulty"}
    assert {f"CKV_K8S_{number}" for number in (11, 13, 14, 16, 19, 20, 21, 22, 23, 31, 37)} <= planted  # it looks
    found = {(check, at) for check, at in failed if at != "Pod.default.faulty"}
    assert {(check, at) for check, at in found if not re.fullmatch(EXPLAINED.get(check, ("", ""))[0], at)} == set()
    assert {check for check, _ in found} == EXPLAINED.keys()
    assert passed > 1000
