"""Jobs on a Ray cluster through Ray's Jobs API: sent, followed, tried again, listed, stopped.

In: the arguments of an `mmllm` command, and where the cluster is. Out: what the job prints, and the exit code that it
ended with. The folder that it is sent from goes with it; what is too large or too private to go is left out. Knows
nothing of what a job does.
"""

import asyncio
import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.local import require_listener
from cluster.local_cluster import local_cluster
from cluster.pins import PINS, pins
from cluster.ray_record import RunningRay, find_running, running_rays, showing_token, token_is_named
from mmllm_core.errors import EnvironmentLack, MmllmError

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

LEFT_OUT = (
    *(".git/", ".venv*/", "venv/", "__pycache__/", "*.egg-info/", "node_modules/"),
    *(".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".hypothesis/"),
    *(".env", ".env.*", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*", ".netrc", ".ssh/", ".aws/", ".kube/"),
)
"""Never packed, in gitignore's syntax; nor is what a `.gitignore` or a `.rayignore` of the folder names."""

STOPPED = 128 + 15
"""Exit code of a job that was stopped, as of a command that SIGTERM ends."""

_TALKATIVE = (
    *("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk"),
    *("_private.runtime_env.packaging", "_private.runtime_env.working_dir"),
)
"""Of Ray's modules, those that tell of every file that is left out."""
_STOP_WITHIN_S = 30
_READY_WITHIN_S = 60.0
_LOST_AFTER = 10
"""Attempts to reach the cluster again, a second apart and more."""


@dataclass(frozen=True)
class Job:
    """An `mmllm` command to be run on a cluster."""

    arguments: tuple[str, ...]
    """As on the command line, after `mmllm`; files of the folder by their path in it."""
    folder: Path
    """Where the job shall find itself: packed and sent."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the job's processes. Whoever sees the dashboard can read them."""
    pinned: bool = True
    """Whether all nodes must have the versions of packages that this machine has."""

    @property
    def entrypoint(self) -> str:
        """The shell command that a node of the cluster runs."""
        return shlex.join(["python", "-m", "cluster.cli", *self.arguments])

    def variables(self) -> dict[str, str]:
        """Environment of the job's processes."""
        found = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WITHIN_S)} | dict(self.environment)
        return found | {PINS: json.dumps(pins())} if self.pinned else found


@contextmanager
def jobs_of(address: str | None) -> Iterator["JobSubmissionClient"]:
    """Ray's client of the cluster at an address, or of the local one.

    Args:
        address: URL of a dashboard, or `HOST:PORT` of a Ray; if None, `RAY_API_SERVER_ADDRESS` or `RAY_ADDRESS`, and
            then the local cluster's.

    Raises:
        EnvironmentLack: no cluster is named and none runs here, it does not answer, or it asks for another token.
    """
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    found = _recorded(named)
    if named is None and found is None:
        raise EnvironmentLack(
            "no cluster to send jobs to: 'mmllm cluster up' starts one here, or name one by --address"
        )
    if found and found.dashboard is None:
        raise EnvironmentLack(
            f"the Ray of '{found.command}' takes no jobs: send them to a cluster that 'mmllm cluster up' started"
        )
    url = found.dashboard if found else named
    with ExitStack() as stack:
        if found and not token_is_named():
            stack.enter_context(showing_token(found.token_file))
        before = os.environ.get("RAY_API_SERVER_ADDRESS")
        os.environ["RAY_API_SERVER_ADDRESS"] = str(url)  # Ray heeds this before any argument
        try:
            if "://" not in str(url):
                require_listener(str(url))
            client = JobSubmissionClient(url)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise EnvironmentLack(
                f"the cluster at '{url}' takes no jobs ({str(error).splitlines()[0]}): name its dashboard by "
                "--address, and its token by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
            ) from error
        finally:
            if before is None:
                del os.environ["RAY_API_SERVER_ADDRESS"]
            else:
                os.environ["RAY_API_SERVER_ADDRESS"] = before
        for module in _TALKATIVE:
            logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)
        yield client


def _recorded(named: str | None) -> RunningRay | None:
    if named is None:
        return local_cluster()
    if "://" in named:
        return next((ray for ray in running_rays() if ray.dashboard == named.rstrip("/")), None)
    return find_running(named)


def send(client: "JobSubmissionClient", job: Job, name: str | None = None) -> str:
    """Pack the folder, upload it and start the job.

    Args:
        name: that the job shall go by; Ray makes one up if None.

    Returns:
        The job's id.

    Raises:
        MmllmError: the folder is too large, the name is taken, or the cluster refuses the job.
    """
    runtime_env = {"working_dir": str(job.folder), "excludes": list(LEFT_OUT), "env_vars": job.variables()}
    ends = time.monotonic() + _READY_WITHIN_S
    while True:
        try:
            submitted: str = client.submit_job(entrypoint=job.entrypoint, runtime_env=runtime_env, submission_id=name)
            return submitted
        except (RuntimeError, ValueError, OSError) as error:
            if "No available agent" in str(error) and time.monotonic() < ends:
                time.sleep(0.5)  # the cluster has only just started
                continue
            said = next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), repr(error))
            raise MmllmError(
                f"the job was not taken: {said} (packed: {job.folder}; name what need not go in a .rayignore there)"
            ) from error


def follow(client: "JobSubmissionClient", job_id: str, write: Callable[[str], object]) -> "JobDetails":
    """Write what a job prints, from its beginning, until it ends.

    A connection that breaks is made again, and nothing is written twice.

    Raises:
        EnvironmentLack: the cluster is gone.
        MmllmError: it knows no such job.
    """
    import aiohttp

    written, lost = 0, 0
    while True:
        seen = 0
        try:
            details_of(client, job_id)
            for piece in _pieces(client, job_id):
                if seen + len(piece) > written:
                    write(piece[max(0, written - seen) :])
                    written = seen + len(piece)
                seen += len(piece)
            details = details_of(client, job_id)
            if details.status.is_terminal():
                return details
            lost = 0
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            lost += 1
            if lost > _LOST_AFTER:
                raise EnvironmentLack(
                    f"job {job_id}: the cluster does not answer any more ({error}): look again with "
                    f"'mmllm submit logs {job_id}'"
                ) from error
        time.sleep(min(5.0, 0.2 * 2**lost))


def details_of(client: "JobSubmissionClient", job_id: str) -> "JobDetails":
    """What the cluster knows of a job.

    Raises:
        MmllmError: the cluster knows no such job.
    """
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "does not exist" in str(error) or "404" in str(error):
            raise MmllmError(f"job '{job_id}' is unknown there: 'mmllm submit list' names all") from error
        raise


def exit_code(details: "JobDetails") -> int:
    """Of a job that has ended, as a shell has it: 128 and the signal's number where a signal ended it."""
    from ray.job_submission import JobStatus

    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code: int | None = details.driver_exit_code
    if code is None:  # it did not come to run, or nobody saw it end
        return 1
    return 128 - code if code < 0 else code


def _pieces(client: "JobSubmissionClient", job_id: str) -> Iterator[str]:
    """What the Jobs API tells as it comes, in a loop of its own."""
    with asyncio.Runner() as runner:
        tail = client.tail_job_logs(job_id)
        while True:
            try:
                yield runner.run(anext(tail))
            except StopAsyncIteration:
                return
