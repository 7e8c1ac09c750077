"""A Ray cluster on this machine that outlives the command that starts it: a head, and worker nodes, each a raylet.

A process in the background holds it, and it ends with that process. Only one of them runs for each home; the token that
it asks for, and where it is, is kept in `cluster.ray_record`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.local import MODALITY_SHARES, interruptible, n_gpus
from cluster.ray_record import RunningRay, recording, running_rays, token_is_named
from mmllm_core.errors import EnvironmentLack
from mmllm_core.models.home import home

ENDS_WITHIN_S = 60.0
OBJECT_STORE_BYTES = 2**29
"""Of each node's shared memory for objects, which is taken as it is used."""


@dataclass(frozen=True)
class Shape:
    """Of a cluster; the head runs no work, as on Kubernetes."""

    workers: int
    """Nodes beside the head."""
    cpus: int
    """That Ray counts on each of them."""


def local_cluster() -> RunningRay | None:
    """The one that runs, if any; Rays of other commands are none, and have no dashboard."""
    return next((ray for ray in running_rays() if ray.dashboard), None)


def start(shape: Shape) -> RunningRay:
    """Start one in the background and wait until all of its nodes are there.

    Raises:
        EnvironmentLack: one runs already, the environment names a token of its own, or it did not start.
    """
    _require_room()
    log = log_file()
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    except OSError as error:
        raise EnvironmentLack(f"{log}: cannot be written ({error.strerror}): free space or set MMLLM_HOME") from error
    command = [sys.executable, "-m", "cluster.cli", "cluster", "up", "--stay"]
    command += ["--workers", str(shape.workers), "--cpus", str(shape.cpus)]
    # Jobs find Python by name, and it shall be this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PATH": path}
    with output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    try:
        while not (found := local_cluster()):
            if process.poll() is not None:
                said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                why = said[-1].removeprefix("mmllm: ") if said else "it said nothing"
                raise EnvironmentLack(f"the cluster did not start: {why} (see {log})")
            time.sleep(0.1)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    return found


def hold(shape: Shape, ready: Callable[[RunningRay], object]) -> None:
    """Be the cluster until SIGTERM or Ctrl-C, or until its head ends.

    Args:
        ready: is told of the cluster as soon as all of its nodes are there.

    Raises:
        EnvironmentLack: one runs already, the environment names a token of its own, a node did not start, the head has
            ended, or the home folder cannot be written.
    """
    from ray.cluster_utils import Cluster

    from cluster.modalities import RESOURCES
    from serve_apps.proxy import PROXY_ENVIRONMENT

    _require_room()
    os.environ.update(PROXY_ENVIRONMENT)
    # Agents take any free port: another Ray here may have the usual one, and a node without its agent takes no job.
    common = {"dashboard_agent_listen_port": None, "object_store_memory": OBJECT_STORE_BYTES}
    resources = dict.fromkeys(RESOURCES, MODALITY_SHARES)
    with ExitStack() as stack:
        publish = stack.enter_context(recording())
        cluster = Cluster()
        stack.callback(cluster.shutdown)
        try:
            head = cluster.add_node(num_cpus=0, include_dashboard=True, **common)
            for number in range(shape.workers):
                # Ray numbers GPUs from 0 on each node, so that only one node can have those of a machine.
                gpus = n_gpus() if number == 0 else 0
                # Each unpacks what a job brings in a folder of its own, or it would clear away what others work in.
                brought = f"runtime_resources_{number + 1}"
                cluster.add_node(
                    num_cpus=shape.cpus, num_gpus=gpus, resources=resources, runtime_env_dir_name=brought, **common
                )
        except Exception as error:  # Ray's own, which has no type
            raise EnvironmentLack(f"a node did not start ({error}): ask for fewer, with --workers") from error
        publish(cluster.address, f"http://{cluster.webui_url}")
        if found := local_cluster():
            ready(found)
        stack.enter_context(interruptible())
        while not head.dead_processes():
            time.sleep(1)
        raise EnvironmentLack("a process of the head has ended, and the cluster with it")


def stop() -> RunningRay:
    """End the cluster and all that runs on it, and wait for that.

    Raises:
        EnvironmentLack: none runs, or it does not end.
    """
    running = local_cluster()
    if running is None:
        raise EnvironmentLack("no cluster of this MMLLM_HOME runs here: start one with 'mmllm cluster up'")
    try:
        process = psutil.Process(running.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=ENDS_WITHIN_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired as error:
        raise EnvironmentLack(
            f"process {running.pid} does not end: kill it, and what it started ends (see {log_file()})"
        ) from error
    return running


def _require_room() -> None:
    if running := local_cluster():
        raise EnvironmentLack(f"a cluster runs at {running.address} already: end it with 'mmllm cluster down'")
    if token_is_named():
        raise EnvironmentLack(
            "the environment names a Ray token (RAY_AUTH_...), and a cluster here has one of its own: unset it"
        )


def log_file() -> Path:
    """What the process in the background prints."""
    return home() / "cluster.log"
