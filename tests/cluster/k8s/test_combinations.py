"""Every overlay and job renders with the components that go with it, and nothing is wrong with what comes out."""

import itertools
from pathlib import Path

import pytest

from cluster.k8s.manifests import of_kind, pod_templates
from cluster.k8s.render import COMPONENTS, Target, conflict, find_target, jobs, overlays, render
from cluster.k8s.schemas import core_findings
from cluster.k8s.validation import validate
from mmllm_core.errors import ConfigError
from tests.cluster.k8s.conftest import ROOT, Rendered, one

OWN = {
    "dev-cpu": set(),
    "staging": {"gpu", "spot", "monitoring", "gateway"},
    "prod-gpu": {"gpu", "gcs-ft-redis", "monitoring", "gateway"},
}
FOR_JOBS = ("kueue", "spot", "s3-storage", "log-shipping")


def _goes(overlay: str, components: tuple[str, ...]) -> bool:
    return not OWN[overlay] & set(components) and conflict(OWN[overlay] | set(components)) is None


def _all(overlay: str) -> list[tuple[str, ...]]:
    """Every set of components that an overlay takes."""
    counts = range(len(COMPONENTS) + 1)
    sets = itertools.chain.from_iterable(itertools.combinations(COMPONENTS, count) for count in counts)
    return [components for components in sets if _goes(overlay, components)]


def _combinations() -> list[tuple[str, tuple[str, ...]]]:
    """All sets of the overlays that have most components themselves; of dev-cpu, which has none, pairs and largest."""
    every = [("dev-cpu", chosen) for chosen in _all("dev-cpu")]
    largest = [(name, c) for name, c in every if not any(set(c) < set(other) for _, other in every)]
    return [
        *((name, c) for name, c in every if len(c) <= 2),
        *largest,
        *((name, c) for name in ("staging", "prod-gpu") for c in _all(name)),
    ]


@pytest.mark.lengthy
@pytest.mark.parametrize(("overlay", "components"), _combinations())
def test_an_overlay_with_components_is_valid(
    rendered: Rendered, crds: Path, overlay: str, components: tuple[str, ...]
) -> None:
    found = validate(rendered(overlay, *components), crds=crds)
    assert [str(finding) for finding in found] == []


@pytest.mark.parametrize("job", jobs(ROOT))
def test_a_job_is_valid(rendered: Rendered, crds: Path, job: str) -> None:
    found = validate(rendered(f"jobs/{job}"), context=render(Target(ROOT / "base", ROOT)), crds=crds)
    assert [str(finding) for finding in found] == []


@pytest.mark.parametrize("components", [*((c,) for c in FOR_JOBS), FOR_JOBS], ids="+".join)
def test_a_job_with_components_is_valid(rendered: Rendered, crds: Path, components: tuple[str, ...]) -> None:
    found = validate(rendered("jobs/instruct", *components), context=render(Target(ROOT / "base", ROOT)), crds=crds)
    assert [str(finding) for finding in found] == []


@pytest.mark.long
def test_all_components_that_go_together_are_valid(rendered: Rendered, crds: Path) -> None:
    tried = _all("dev-cpu")
    assert len(tried) > 500
    for components in tried:
        found = validate(rendered("dev-cpu", *components), crds=crds)
        assert not found, (components, [str(finding) for finding in found])


def test_the_overlays_are_those_that_are_tested() -> None:
    assert set(overlays(ROOT)) == OWN.keys()
    assert {path.name for path in (ROOT / "components").iterdir()} == {*COMPONENTS, "settings"}


def test_all_that_core_schemas_know_is_checked(rendered: Rendered) -> None:
    """A misspelt field of a kind of Kubernetes' own, which the API server would drop, is found."""
    manifests = rendered("prod-gpu")
    one(manifests, "StatefulSet")["spec"]["replica"] = 2
    assert "'replica' was unexpected" in str(core_findings(manifests))


@pytest.mark.parametrize(
    ("name", "components", "said"),
    [
        ("prod", [], "k8s target 'prod' is unknown: choose one of dev-cpu, prod-gpu, staging, jobs/align"),
        ("prod-gpu", ["gpus"], "component 'gpus' is unknown: choose of gpu, vllm"),
        ("prod-gpu", ["gpu"], "component 'gpu' is part of prod-gpu already"),
        ("prod-gpu", ["incremental-upgrade"], "gateway and incremental-upgrade exclude each other"),
        ("dev-cpu", ["vllm"], "vllm needs gpu"),
    ],
)
def test_what_cannot_be_rendered_is_refused(name: str, components: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_target(ROOT, name, components)
    assert said in str(caught.value)


def test_images_come_from_the_registry_that_is_named(rendered: Rendered) -> None:
    target = find_target(ROOT, "prod-gpu", ["vllm"], registry="registry.example.com/team", tag="2.3.4")
    service = one(render(target), "RayService")["spec"]["rayClusterConfig"]
    images = [g["template"]["spec"]["containers"][0]["image"] for g in service["workerGroupSpecs"]]
    names = ("serve", "vision", "audio", "text-vllm")
    assert images == [f"registry.example.com/team/{name}:2.3.4" for name in names]


def test_a_setting_that_changes_rolls_the_pods(rendered: Rendered) -> None:
    """The settings' name has a hash of them, and what reads them names it."""
    plain, stored = rendered("dev-cpu"), rendered("dev-cpu", "s3-storage")
    names = []
    for manifests in (plain, stored):
        settings = next(
            m for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"].startswith("mmllm-settings")
        )
        names.append(settings["metadata"]["name"])
        for kind, at in (("RayService", "rayClusterConfig"), ("RayCluster", None)):
            spec = one(manifests, kind)["spec"]
            cluster = spec[at] if at else spec
            read = cluster["workerGroupSpecs"][3]["template"]["spec"]["containers"][0]["envFrom"][0]
            assert read == {"configMapRef": {"name": names[-1]}}
            assert cluster["autoscalerOptions"]["envFrom"][0] == read
    assert names[0] != names[1]


@pytest.mark.parametrize("target", ["dev-cpu", "jobs/instruct"])
def test_all_pods_of_ray_can_open_the_object_store(rendered: Rendered, target: str) -> None:
    for pod in pod_templates(rendered(target, "s3-storage")):
        if pod.group is not None:
            assert {"secretRef": {"name": "mmllm-s3"}} in pod.spec["containers"][0]["envFrom"], pod.where


def test_the_dashboard_is_the_one_of_the_documentation() -> None:
    shipped = ROOT / "components/monitoring/mmllm.json"
    assert shipped.read_bytes() == (ROOT.parent / "docs/grafana/mmllm.json").read_bytes()
