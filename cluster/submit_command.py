"""`mmllm submit`: other commands, run on a cluster. The work is `cluster.job_submission`'s and `cluster.ray_job`'s."""

import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from cluster.job_submission import Job, details_of, exit_code, follow, jobs_of, send
from cluster.ray_job import RayJobOptions, manifest
from mmllm_core.errors import ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

submit_app = typer.Typer(help="Run a command on a cluster.", no_args_is_help=True)
console = Console()
SENT = ("train", "evaluate", "embed")
"""Commands that can be submitted."""

Address = Annotated[
    str | None, typer.Option(help="URL of a cluster's dashboard, or HOST:PORT of its Ray; else the local cluster.")
]
Wait = Annotated[bool, typer.Option(help="Follow the job until it ends.")]
JobId = Annotated[str, typer.Argument(help="As 'mmllm submit list' names it.")]


@dataclass(frozen=True)
class Options:
    """How a job is sent and watched."""

    wait: bool
    retries: int
    name: str | None


def submit(
    context: typer.Context,
    address: Address = None,
    wait: Wait = True,
    retries: Annotated[int, typer.Option(min=0, help="How often a job that failed is sent again.")] = 0,
    name: Annotated[str | None, typer.Option(help="That the job goes by; one is made up if not given.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder that goes with the job, and that it runs in.")] = Path(),
    env: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of the job's environment; not for secrets, as it is shown.")
    ] = None,
    pins: Annotated[bool, typer.Option(help="Ask all nodes for the versions of packages that are here.")] = True,
    kubernetes: Annotated[
        Path | None,
        typer.Option(help="Write a RayJob for 'kubectl create -f' to this file (-: print it); send nothing."),
    ] = None,
    image: Annotated[str, typer.Option(help="Of the RayJob's pods.")] = "mmllm/train:0.1.0",
    nodes: Annotated[int, typer.Option(min=1, help="Worker pods of the RayJob.")] = 2,
) -> None:
    """Send a command, whose own arguments and options stand among these; end as it ends."""
    if retries and not (wait or kubernetes):
        raise ConfigError("--retries: this command sends a job again, so it must stay: leave --no-wait out")
    folder = folder.absolute()
    if not folder.is_dir():
        raise ConfigError(f"--folder {folder}: no such folder")
    job = Job(_checked(context, folder), folder, dict(_pair(item) for item in env or []), pins)
    if kubernetes is not None:
        _write_manifest(job, RayJobOptions(name, image, nodes, retries), kubernetes)
        return
    with jobs_of(address) as client:
        code = _run(client, job, Options(wait, retries, name))
    raise typer.Exit(code)


for _name in SENT:
    submit_app.command(
        _name,
        help=f"Run 'mmllm {_name}' there. Its exit code is the command's. Arguments and options: those of "
        f"'mmllm {_name}' ('mmllm {_name} --help'), and these.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(submit)


def _pair(item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not (key and equals):
        raise ConfigError(f"--env {item}: write it as KEY=VALUE")
    return key, value


@submit_app.command("list")
def list_jobs(address: Address = None) -> None:
    """Print the cluster's jobs, the last one first."""
    with jobs_of(address) as client:
        jobs = [job for job in client.list_jobs() if job.submission_id]
    table = Table(box=None, padding=(0, 1))
    for heading in ("job", "state", "started", "ran for"):
        table.add_column(heading, no_wrap=True)
    table.add_column("command", overflow="fold")
    for job in sorted(jobs, key=lambda job: -(job.start_time or 0)):
        began = datetime.fromtimestamp(job.start_time / 1000) if job.start_time else None
        seconds = ((job.end_time or time.time() * 1000) - job.start_time) / 1000 if job.start_time else 0
        table.add_row(
            job.submission_id,
            str(job.status).lower(),
            f"{began:%m-%d %H:%M:%S}" if began else "-",
            f"{seconds:.0f} s",
            job.entrypoint.removeprefix("python -m cluster.cli "),
        )
    console.print(table, highlight=False)


@submit_app.command()
def stop(job: JobId, address: Address = None) -> None:
    """Stop a job: it has half a minute to end by itself."""
    with jobs_of(address) as client:
        details_of(client, job)
        stopped = client.stop_job(job)
    console.print(f"job {job} {'is being stopped' if stopped else 'had ended'}", highlight=False)


@submit_app.command()
def logs(job: JobId, address: Address = None, wait: Wait = True) -> None:
    """Print what a job says, until it ends; the exit code is the job's."""
    with jobs_of(address) as client:
        if not wait:
            details_of(client, job)
            sys.stdout.write(client.get_job_logs(job))
            return
        raise typer.Exit(_watch(client, job))


def _run(client: "JobSubmissionClient", job: Job, options: Options) -> int:
    from ray.job_submission import JobStatus

    for attempt in range(options.retries + 1):
        name = f"{options.name}-{attempt}" if options.name and attempt else options.name
        job_id = send(client, job, name)
        _tell(f"job {job_id} is sent to {client.get_address()}")
        if not options.wait:
            _tell(f"follow it: mmllm submit logs {job_id}   stop it: mmllm submit stop {job_id}")
            return 0
        code = _watch(client, job_id)
        if code == 0 or attempt == options.retries or details_of(client, job_id).status == JobStatus.STOPPED:
            break
        pause = min(60.0, 2.0**attempt)
        _tell(f"job {job_id} failed with exit code {code}: attempt {attempt + 2} in {pause:g} s")
        time.sleep(pause)
    return code


def _watch(client: "JobSubmissionClient", job_id: str) -> int:
    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        details = follow(client, job_id, write)
    except KeyboardInterrupt:
        _tell(f"job {job_id} goes on: mmllm submit logs {job_id}, or mmllm submit stop {job_id}")
        raise
    code = exit_code(details)
    if details.driver_exit_code is None and code:
        _tell(f"job {job_id}: {str(details.message).strip()}")
    return code


def _checked(context: typer.Context, folder: Path) -> tuple[str, ...]:
    """The command's arguments, read as the command itself will read them, so that mistakes are told here and now.

    Files that are named must lie in the folder that goes along, and are named by their path in it.
    """
    from mmllm_core.config import parse_overrides
    from train_jobs.recipe import load_recipe

    root = context.find_root().command
    name = str(context.info_name)
    assert isinstance(root, TyperGroup)
    command = root.commands[name]
    given = command.make_context(name, list(context.args), parent=context.find_root()).params
    arguments = list(context.args)
    recipe = given.get("recipe")
    if recipe is not None and "resume" not in {key for key, value in given.items() if value is not None}:
        load_recipe(recipe, parse_overrides(given["overrides"] or []))
        if recipe.endswith((".yaml", ".yml")):
            arguments[arguments.index(recipe)] = _inside(folder, Path(recipe))
    return (name, *arguments)


def _inside(folder: Path, file: Path) -> str:
    try:
        return str(file.resolve().relative_to(folder.resolve()))
    except ValueError as error:
        raise ConfigError(
            f"{file}: does not lie in {folder}, which goes with the job: name another --folder"
        ) from error


def _write_manifest(job: Job, options: RayJobOptions, file: Path) -> None:
    text = manifest(job, options)
    if str(file) == "-":
        sys.stdout.write(text)
    else:
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--kubernetes {file}: cannot be written ({error.strerror})") from error
        _tell(f"start it: kubectl create -f {file}")


def _tell(said: Any) -> None:
    """On stderr: stdout is the job's."""
    Console(stderr=True).print(said, highlight=False, soft_wrap=True, markup=False)
