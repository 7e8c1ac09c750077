"""Worker nodes of a Ray cluster as processes on this machine: each a raylet, started by Ray's own command.

In: where the cluster is, and what each node offers. Out: nodes that run as long as a block does. They show the token
that the environment names.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mmllm_core.errors import EnvironmentLack

STARTS_WITHIN_S = 120.0


@contextmanager
def worker_nodes(address: str, count: int, *, cpus: int, resources: Mapping[str, float]) -> Iterator[None]:
    """Run the block with so many nodes more in the cluster that this process has joined.

    Args:
        address: `HOST:PORT` of the cluster's head, which is this machine.
        cpus, resources: that Ray counts on each node.

    Raises:
        EnvironmentLack: a node did not start.
    """
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start"),
        *("--address", address, "--node-ip-address", address.rpartition(":")[0]),
        *("--num-cpus", str(cpus), "--resources", json.dumps(dict(resources))),
        # any free port, for nodes of one machine share its ports
        *("--min-worker-port", "0", "--max-worker-port", "0"),
        *("--log-style", "record", "--disable-usage-stats", "--block"),
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            # One after another: each names its sockets by counting those that are there already.
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
            _wait_for(started)
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(started: list[subprocess.Popen[bytes]]) -> None:
    import ray

    ends = time.monotonic() + STARTS_WITHIN_S
    while sum(node["Alive"] for node in ray.nodes()) <= len(started):
        if any(process.poll() is not None for process in started):
            raise EnvironmentLack("a worker node ended as it started, and said why above")
        if time.monotonic() > ends:
            raise EnvironmentLack(
                f"worker node {len(started)} did not start in {STARTS_WITHIN_S:g} s: ask for fewer, with --workers"
            )
        time.sleep(0.1)
