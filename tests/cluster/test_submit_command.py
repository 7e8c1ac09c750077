"""A local cluster of several raylets, and jobs on it through Ray's Jobs API: token authentication is on everywhere."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from ray.job_submission import JobSubmissionClient

from cluster.job_submission import jobs_of
from cluster.local_cluster import local_cluster
from cluster.ray_record import RunningRay
from mmllm_core.bundle import Bundle
from tests.train_jobs.conftest import TinyRecipe, tiny_home, tiny_recipe  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_shared_home")]

Run = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`mmllm` with arguments, in a folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        env=environment | {"COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def cluster(tiny_home: Path) -> Iterator[RunningRay]:  # noqa: F811
    """A head and two worker nodes of one CPU each."""
    started = command("cluster", "up", "--workers", "2", "--cpus", "1")
    try:
        assert started.returncode == 0, started.stderr
        found = local_cluster()
        assert found
        yield found
    finally:
        ended = command("cluster", "down")
    assert ended.returncode == 0, ended.stderr
    assert not psutil.pid_exists(found.pid)
    assert local_cluster() is None


@pytest.fixture
def _shared_home(_home_of_the_test: None, tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("MMLLM_HOME", str(tiny_home))


@pytest.fixture
def client(cluster: RunningRay) -> Iterator[JobSubmissionClient]:
    with jobs_of(None) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path, tiny_recipe: TinyRecipe) -> Path:  # noqa: F811
    """What a job is sent from: a recipe, and what must stay here."""
    recipe = tiny_recipe("sent", workers=2, steps=4)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "sent.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    for private in (".env", "server.key", "weights.bin", ".git/config"):
        (tmp_path / private).parent.mkdir(exist_ok=True)
        (tmp_path / private).write_text("private", encoding="utf-8")
    (tmp_path / ".gitignore").write_text("weights.bin\n", encoding="utf-8")
    return tmp_path


def test_the_cluster_has_its_nodes_and_only_this_machine_and_the_token_reach_it(cluster: RunningRay) -> None:
    shown = command("cluster", "status")
    assert shown.returncode == 0, shown.stderr
    rows = [line.split() for line in shown.stdout.splitlines() if " alive " in line]
    assert len(rows) == 3
    assert sum("head" in row for row in rows) == 1
    assert sum("0/1" in row and "0/8" in row for row in rows) == 2
    again = command("cluster", "up")
    assert again.returncode == 1
    assert f"runs at {cluster.address} already" in again.stderr
    assert cluster.dashboard
    port = int(cluster.dashboard.rpartition(":")[2])
    listening = [c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
    assert listening == ["127.0.0.1"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=30)
    assert cluster.token_file.stat().st_mode & 0o777 == 0o600


def test_training_is_sent_with_its_folder_and_runs_on_both_nodes(
    client: JobSubmissionClient, cluster: RunningRay, folder: Path
) -> None:
    sent = command("submit", "train", "recipes/sent.yaml", "steps=6", "--name", "train-sent", folder=folder)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    bundle = Bundle.latest()
    assert bundle.info.name == "sent"
    assert str(bundle.folder) in sent.stdout
    packed = client.get_job_info("train-sent").runtime_env["working_dir"]
    sessions = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    (unpacked,) = sessions.glob(f"session_*_{cluster.pid}/runtime_resources/working_dir_files/{Path(packed).stem}")
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert files >= {"recipes/sent.yaml", ".gitignore"}
    assert not [name for name in files if name.startswith((".env", "server", "weights", ".git/"))]


def test_a_failed_job_is_sent_again_and_its_exit_code_is_the_commands(client: JobSubmissionClient) -> None:
    failed = command("submit", "evaluate", "--name", "asks", "--retries", "1", "--bundle", "/nowhere")
    assert failed.returncode == 1
    assert failed.stdout.count("/nowhere: no such bundle") or failed.stdout.count("/nowhere") >= 2
    assert {client.get_job_info(name).driver_exit_code for name in ("asks", "asks-1")} == {1}
    client.submit_job(entrypoint="echo said; exit 7", submission_id="seven")
    told = command("submit", "logs", "seven")
    # Ray's own line of the entrypoint may come after what a quick one said.
    assert (told.returncode, "said" in told.stdout.splitlines()) == (7, True), told.stdout


def test_nodes_with_other_packages_are_named(cluster: RunningRay, tmp_path: Path) -> None:
    pins = json.dumps({"numpy": "0.1", "python": ".".join(map(str, sys.version_info[:2]))})
    refused = command(
        *("submit", "embed", "embedded-instruct", "--no-pins", "--env", f"MMLLM_PINS={pins}"), folder=tmp_path
    )
    assert refused.returncode == 1
    said = " ".join(refused.stdout.split())
    assert said.count("has numpy") == 4, said  # where the job runs, and on three nodes
    assert "not 0.1" in said
    assert "python" not in said.partition("mmllm:")[2].partition("give all nodes")[0]


def test_a_job_is_listed_and_stopped(client: JobSubmissionClient) -> None:
    client.submit_job(entrypoint="echo begun; sleep 600", submission_id="sleeps")
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "submit", "logs", "sleeps"], stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout
        try:
            assert any("begun" in line for line in watching.stdout)
            rows = [line.split() for line in command("submit", "list").stdout.splitlines()]
            assert [row[1] for row in rows if row[:1] == ["sleeps"]] == ["running"]
            assert command("submit", "stop", "sleeps").returncode == 0
            assert watching.wait(timeout=60) == 143
        finally:
            watching.kill()
    for verb in ("stop", "logs"):
        unknown = command("submit", verb, "no-such-job")
        assert unknown.returncode == 1
        assert "'no-such-job' is unknown" in unknown.stderr


def test_mistakes_are_told_before_anything_is_sent(client: JobSubmissionClient, folder: Path, tmp_path: Path) -> None:
    before = len(client.list_jobs())
    outside = tmp_path.parent / f"{tmp_path.name}-outside.yaml"
    outside.write_bytes((folder / "recipes" / "sent.yaml").read_bytes())
    for arguments, said in {
        ("train", "no-such-recipe"): "no-such-recipe",
        ("train", "recipes/sent.yaml", "stpes=3"): "stpes",
        ("train", "recipes/sent.yaml", "--workers", "none"): "--workers",
        ("train", str(outside)): "does not lie in",
        ("evaluate", "--question", "3"): "--question",
        ("evaluate", "--env", "A"): "KEY=VALUE",
        ("evaluate", "--no-wait", "--retries", "1"): "--retries",
        ("evaluate", "--folder", "/nowhere"): "/nowhere",
    }.items():
        done = command("submit", *arguments, folder=folder)
        assert done.returncode in (1, 2), done.stdout
        assert said in done.stderr, done.stderr
    outside.unlink()
    assert len(client.list_jobs()) == before
