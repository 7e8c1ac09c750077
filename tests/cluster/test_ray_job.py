"""A job as a RayJob: what KubeRay's own definition takes, with the recipe, the token and the retries in it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.job_submission import Job
from cluster.pins import PINS
from cluster.ray_job import RayJobOptions, manifest
from mmllm_core.errors import ConfigError

CRDS = Path(os.environ.get("MMLLM_TEST_KUBERAY_CRDS", "/nowhere"))


def written(job: Job, **changes: Any) -> list[dict[str, Any]]:
    options = {"name": "align", "image": "registry.example/train:1", "nodes": 3, "retries": 2} | changes
    return list(yaml.safe_load_all(manifest(job, RayJobOptions(**options))))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("name: mine\n", encoding="utf-8")
    return Job(("train", "recipes/mine.yaml", "name=it's mine", "--workers", "3"), tmp_path, {"A": "b: c"})


def test_the_recipe_goes_along_and_the_command_finds_it(job: Job) -> None:
    settings, files, ray_job = written(job)
    spec = ray_job["spec"]
    assert settings["data"]["MMLLM_HOME"] == "/var/lib/mmllm"
    assert files["data"] == {"recipes_mine.yaml": "name: mine\n"}
    assert {part["metadata"]["namespace"] for part in (settings, files, ray_job)} == {"mmllm"}
    assert spec["entrypoint"] == (
        "python -m cluster.cli train /etc/mmllm/job/recipes_mine.yaml 'name=it'\"'\"'s mine' --workers 3"
    )
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"]) == (2, True)
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert variables["A"] == "b: c"
    assert json.loads(variables[PINS])["ray"] == "2.60.0"
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "mmllm-ray-token"}
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == 3
    for template in (cluster["headGroupSpec"]["template"], group["template"], spec["submitterPodTemplate"]):
        pod = template["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry.example/train:1"
        assert container["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert volumes["job-files"]["configMap"] == {"name": files["metadata"]["name"]}
        assert pod["securityContext"]["runAsNonRoot"]


def test_a_shipped_recipe_needs_no_file(job: Job) -> None:
    settings, ray_job = written(replace(job, arguments=("train", "phi-align")))
    assert settings["metadata"]["name"] == "align-settings"
    assert ray_job["spec"]["entrypoint"].endswith("train phi-align")


def test_kuberay_knows_every_field(job: Job) -> None:
    file = CRDS / "ray.io_rayjobs.yaml"
    if not file.is_file():
        pytest.skip("no KubeRay definitions: name their folder in MMLLM_TEST_KUBERAY_CRDS")
    definition = yaml.safe_load(file.read_text(encoding="utf-8"))
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1")
    validator = jsonschema.Draft7Validator(_closed(schema))
    ray_job = written(job)[-1]
    assert [error.message for error in validator.iter_errors(ray_job)] == []
    ray_job["spec"]["backofLimit"] = 1
    assert [error.message for error in validator.iter_errors(ray_job)]


@pytest.mark.parametrize("name", ["Align", "a" * 48, "1st", "a_b", "ends-"])
def test_a_name_that_kubernetes_does_not_take_is_refused(job: Job, name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        written(job, name=name)


def _closed(schema: Any) -> Any:
    """With unknown fields refused, as Kubernetes prunes them; whole numbers may stand for quantities."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and schema["properties"]:
        if "metadata" in schema["properties"] and "spec" in schema["properties"]:
            return closed
        closed.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
        closed["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        closed.pop("pattern", None)
    return closed
