"""`mmllm k8s` as it is typed: what it prints, where, and with which exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.k8s.manifests import read_manifests
from cluster.k8s_commands import k8s_app
from mmllm_core.errors import ConfigError, MmllmError
from tests.cluster.k8s.conftest import ROOT, Rendered


def mmllm(*arguments: str) -> Result:
    """Run `mmllm k8s` in this process; paths are relative to the working directory."""
    return CliRunner().invoke(k8s_app, list(arguments))


def one_line(result: Result) -> str:
    """What is said of a foreseen error, which the command prints as one line."""
    assert isinstance(result.exception, MmllmError), result.output
    assert result.output == ""
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def own(tmp_path: Path, rendered: Rendered, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An overlay of a user's own in the working directory, which builds on one of these."""
    monkeypatch.delenv("MMLLM_KUBERAY_CRDS", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my-cluster"
    folder.mkdir()
    here = os.path.relpath(ROOT, folder.resolve())
    kustomization = {
        "resources": [f"{here}/overlays/prod-gpu"],
        "components": [f"{here}/components/s3-storage"],
        "patches": [
            {
                "target": {"kind": "HTTPRoute"},
                "patch": yaml.safe_dump([{"op": "replace", "path": "/spec/hostnames", "value": ["my.org"]}]),
            }
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def test_an_overlay_of_ones_own_is_validated_rendered_and_compared(own: Path) -> None:
    done = mmllm("validate", own.name)
    assert done.exit_code == 0, done.output
    assert "my-cluster: 33 objects, nothing wrong" in done.stdout
    assert "helm show crds kuberay/kuberay-operator --version 1.7.0" in done.stdout  # its schemas were not there
    rendering = mmllm("render", own.name, "--registry", "r.example.com/m", "--tag", "9.9.9")
    assert rendering.exit_code == 0
    assert "r.example.com/m/text:9.9.9" in rendering.stdout
    assert "registry.invalid" not in rendering.stdout
    changed = mmllm("diff", own.name, "prod-gpu")
    assert changed.exit_code == 1
    lines = changed.stdout.splitlines()
    assert "-  - mmllm.example.com" in lines
    assert "+  - my.org" in lines
    (own / "before.yaml").write_text(mmllm("render", own.name).stdout)
    same = mmllm("diff", own.name, str(own / "before.yaml"))
    assert (same.exit_code, same.stdout) == (0, "")


def test_the_ground_is_all_but_rays_clusters(rendered: Rendered) -> None:
    done = mmllm("render", "dev-cpu", "--ground")
    assert done.exit_code == 0
    ground, whole = read_manifests(done.stdout, "ground"), rendered("dev-cpu")
    assert ground == [each for each in whole if not each["apiVersion"].startswith("ray.io/")]
    assert {each["kind"] for each in whole} - {each["kind"] for each in ground} == {"RayService", "RayCluster"}


def test_what_is_wrong_is_told_and_fails(own: Path, crds: Path) -> None:
    kustomization = yaml.safe_load((own / "kustomization.yaml").read_text())
    fault = {"op": "replace", "path": "/spec/rayClusterConfig/workerGroupSpecs/1/resources", "value": {"vison": "1"}}
    kustomization["patches"].append({"target": {"kind": "RayService"}, "patch": yaml.safe_dump([fault])})
    (own / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    done = mmllm("validate", own.name, "--crds", str(crds))
    assert done.exit_code == 1
    found = [line for line in done.stdout.splitlines() if line.startswith("my-cluster: RayService/mmllm")]
    assert any("workerGroupSpecs[1] (vision): custom resources are {'vison': '1'}" in line for line in found)
    assert "KubeRay 1.7.0's" in done.stdout


def test_bad_input_is_one_line_each(own: Path) -> None:
    unknown = one_line(mmllm("render", "prod"))
    assert "k8s target 'prod' is unknown: choose one of dev-cpu, prod-gpu, staging, jobs/align" in unknown
    assert "or a folder with a kustomization.yaml" in unknown
    (own / "kustomization.yaml").write_text("resource: [x.yaml]\n")
    assert "my-cluster: kustomize cannot build it" in one_line(mmllm("validate", own.name))
    assert "nothing.yaml: cannot be read: No such file" in one_line(mmllm("diff", "prod-gpu", "nothing.yaml"))
    assert "--crds nowhere: cannot be read" in one_line(mmllm("validate", "dev-cpu", "--crds", "nowhere"))
    for command in (("validate",), ("render", "prod-gpu")):
        assert "there are no manifests in nowhere" in one_line(mmllm(*command, "--folder", "nowhere"))


def test_without_kubectl_it_says_what_to_install_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli", "k8s", "render", "dev-cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent), "PATH": str(tmp_path), "COLUMNS": "60"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mmllm: kubectl is not installed")
    assert done.stderr.endswith("install kubectl 1.30\n")
    assert len(done.stderr.splitlines()) == 1


def test_without_its_extra_it_says_which(rendered: Rendered) -> None:
    code = "import sys; sys.modules['kubernetes_validate'] = None; from cluster.cli import main; main()"
    command = [sys.executable, "-c", code, "k8s", "validate", "dev-cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mmllm: kubernetes-validate is not installed: pip install 'mmllm[k8s]'\n"


def test_without_a_cluster_a_comparison_says_so(
    rendered: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert "kubectl cannot compare with a cluster" in one_line(mmllm("diff", "dev-cpu"))


@pytest.mark.parametrize(("text", "said"), [("a: [", "not valid YAML"), ("a: 1", "document 0 lacks apiVersion")])
def test_what_is_no_manifest_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_manifests(text, "f.yaml")
