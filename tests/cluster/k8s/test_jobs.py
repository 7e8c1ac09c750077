"""What jobs run: commands that exist, with recipes and settings that load, after both shells that they pass through."""

import subprocess
from collections.abc import Mapping
from subprocess import list2cmdline  # what `ray job submit` joins a command with

import pytest
import typer

from cluster.cli import app
from cluster.k8s.manifests import Manifest, of_kind
from cluster.k8s.render import jobs
from mmllm_core.config import Recipe, parse_overrides
from tests.cluster.k8s.conftest import ROOT, Rendered, one
from train_jobs.recipe import load_recipe

STORES = ["/var/lib/mmllm/checkpoints", "s3://bucket/prefix?endpoint_override=minio:9000&scheme=http"]


def settings_of(manifests: list[Manifest]) -> dict[str, str]:
    """What every container of a target is told."""
    [settings] = [m for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"].startswith("mmllm-settings")]
    return dict(settings["data"])


def as_run(entrypoint: str, environment: Mapping[str, str]) -> list[str]:
    """The arguments that come out: of the submitter's shell, of Ray's joining them, and of the shell on the head."""
    told = {"PATH": "/usr/bin:/bin", **environment}

    def through_a_shell(command: str) -> list[str]:
        script = f"show() {{ printf '%s\\0' \"$@\"; }}; show {command}"
        done = subprocess.run(["/bin/bash", "-ce", script], env=told, capture_output=True, text=True, check=True)
        return done.stdout.split("\0")[:-1]

    return through_a_shell(list2cmdline(through_a_shell(entrypoint)))


def parsed(arguments: list[str]) -> tuple[str, dict[str, object]]:
    """The subcommand and its values, as the `mmllm` command parses them without running anything."""
    assert arguments[0] == "mmllm"
    command, context = typer.main.get_command(app), None
    names: list[str] = []
    rest = arguments[1:]
    while hasattr(command, "resolve_command"):
        context = command.make_context("mmllm", rest, parent=context, resilient_parsing=False)
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        names.append(str(name))
    return " ".join(names), command.make_context(names[-1], rest, parent=context).params


def _entrypoint(manifests: list[Manifest]) -> str:
    return str(one(manifests, "RayJob")["spec"]["entrypoint"])


RAY_JOBS = [job for job in jobs(ROOT) if job not in ("import", "embedded", "data")]


@pytest.mark.parametrize("job", RAY_JOBS)
def test_a_job_runs_a_command_that_there_is(rendered: Rendered, job: str) -> None:
    manifests = rendered(f"jobs/{job}")
    arguments = as_run(_entrypoint(manifests), settings_of(manifests))
    name, values = parsed(arguments)
    assert name in ("train", "embed", "evaluate")
    workers = one(manifests, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    assert values["workers"] == workers
    if name != "evaluate":
        recipe = load_recipe(str(values["recipe"]), parse_overrides(list(values.get("overrides") or [])))
        if name == "train" and isinstance(recipe, Recipe):
            assert recipe.checkpoint.storage == settings_of(manifests)["MMLLM_CHECKPOINTS"]


@pytest.mark.parametrize("store", STORES)
def test_checkpoints_go_where_the_settings_say(rendered: Rendered, store: str) -> None:
    """Whatever characters a URL has: no shell on the way may read them."""
    manifests = rendered("jobs/instruct")
    arguments = as_run(_entrypoint(manifests), settings_of(manifests) | {"MMLLM_CHECKPOINTS": store})
    assert arguments[-1] == f"checkpoint.storage={store}"


def test_the_import_job_runs_a_command_that_there_is(rendered: Rendered) -> None:
    command = one(rendered("jobs/import"), "Job")["spec"]["template"]["spec"]["containers"][0]["command"]
    name, values = parsed(command)
    assert name == "import llava"
    assert values["name"] == "assistant"


def test_the_data_job_fetches_what_the_recipes_read(rendered: Rendered) -> None:
    command = one(rendered("jobs/data"), "Job")["spec"]["template"]["spec"]["containers"][0]["command"]
    fetched = [parsed(as_run(line, {}))[1]["dataset"] for line in command[2].splitlines()]
    for job in ("align", "instruct"):
        _, values = parsed(as_run(_entrypoint(rendered(f"jobs/{job}")), {}))
        [source] = load_recipe(str(values["recipe"])).data.sources
        assert source.file.parent.name in fetched


def test_the_embedded_job_runs_commands_that_there_are(rendered: Rendered) -> None:
    """It ends with the bundle that the service starts from."""
    command = one(rendered("jobs/embedded"), "Job")["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:2] == ["/bin/bash", "-ec"]
    recipes = []
    for line in command[2].splitlines():
        name, values = parsed(as_run(line, {}))
        assert name == "train"
        recipes.append(load_recipe(str(values["recipe"]), parse_overrides(list(values.get("overrides") or []))).name)
    assert recipes == ["embedded-clip", "assistant"]


def test_an_option_that_is_not_there_is_noticed() -> None:
    """Guards the test itself."""
    with pytest.raises(Exception, match="No such option"):
        parsed(["mmllm", "train", "phi-align", "--wrokers", "8"])


def test_jobs_restart_and_end_by_themselves(rendered: Rendered) -> None:
    for job in RAY_JOBS:
        spec = one(rendered(f"jobs/{job}"), "RayJob")["spec"]
        assert spec["backoffLimit"] >= 1
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0
        mounts = spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMounts"]
        claimed = {mount["mountPath"] for mount in mounts if mount["name"] == "checkpoints"}
        assert claimed == {"/var/lib/mmllm/runs", "/var/lib/mmllm/checkpoints"}
