"""A pod that is to go, played by a network and a process namespace: what it does before it ends, on real Ray and Serve.

Needs root and `ip`, as CI's machine has it. The nodes share a file system, and pods do not; else they are as far apart.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.k8s.conftest import ROOT

APP = """
import asyncio
import ray
from ray import serve
from starlette.responses import StreamingResponse

@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 1}, graceful_shutdown_timeout_s=60)
class Slow:
    async def __call__(self, request):
        async def lines():
            for _ in range(int(request.query_params["seconds"])):
                yield ray.util.get_node_ip_address() + "\\n"
                await asyncio.sleep(1)
        return StreamingResponse(lines())

ray.init(address="auto", log_to_driver=False)
serve.start(http_options={"host": "0.0.0.0", "port": 8000, "location": "EveryNode"})
serve.run(Slow.bind())
"""
NODES = {"head": "10.77.13.1", "going": "10.77.13.2", "other": "10.77.13.3"}


@dataclass(frozen=True)
class Pods:
    """Nodes of a Ray cluster, each in namespaces of its own."""

    folder: Path
    prefix: str
    """Of network namespaces' names."""
    processes: dict[str, "subprocess.Popen[bytes]"]

    def start(self, name: str, *options: str) -> None:
        """Start a node, which ends with the process that is kept."""
        where = ["--head", "--port", "6379"] if name == "head" else ["--address", f"{NODES['head']}:6379"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *where, *options]
        command += ["--node-ip-address", NODES[name], "--object-store-memory", "80000000"]
        inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"{self.prefix}-{name}", *inside], stdout=log, stderr=log, env=environment()
            )
        self.processes[name] = process

    def run(self, name: str, *command: str, timeout: int = 180) -> "subprocess.CompletedProcess[str]":
        """Run a command in a node's pod."""
        return subprocess.run(
            self.inside(name, *command), capture_output=True, text=True, timeout=timeout, env=environment()
        )

    def inside(self, name: str, *command: str) -> list[str]:
        """The command line that runs a command in a node's pod."""
        parent = self.processes[name].pid
        while not (children := Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
            assert self.processes[name].poll() is None, (self.folder / f"{name}.log").read_text()
        child = children[0]
        return ["nsenter", "--target", child, "--net", "--pid", "--mount", *command]


def environment() -> dict[str, str]:
    """As KubeRay sets it, and short times."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    told = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return told | {
        "PATH": path,
        "RAY_ADDRESS": f"{NODES['head']}:6379",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "COLUMNS": "80",  # as a terminal may have set it
        "RAY_raylet_start_wait_time_s": "180",  # of a busy machine
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
    }


@pytest.fixture
def pods() -> Iterator[Pods]:
    """Networks for a head and two workers, with nothing in them yet."""
    needed = ("ip", "unshare", "nsenter", "ps", "pgrep", "curl")
    if os.geteuid() != 0 or not all(map(shutil.which, needed)):
        pytest.skip(f"namespaces need root and {', '.join(needed)}")
    prefix = f"mmllm{os.getpid()}"
    made = Pods(Path(tempfile.mkdtemp(prefix="mm")), prefix, {})  # a short path, for Ray's sockets lie below it
    switch = f"{prefix}-switch"  # in a network of its own too: the machine's is left as it is

    def ip(*arguments: str, check: bool = True) -> None:
        subprocess.run(["ip", *arguments], check=check, capture_output=True)

    try:
        if subprocess.run(["ip", "netns", "add", switch], capture_output=True).returncode:
            pytest.skip("this machine lets nobody make networks")
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for name, address in NODES.items():
            space = f"{prefix}-{name}"
            ip("netns", "add", space)
            ip("link", "add", name, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", switch, "link", "set", name, "master", "bridge", "up")
            ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "route", "add", "default", "dev", "eth0")
        yield made
    finally:
        for process in made.processes.values():
            process.kill()
        for process in made.processes.values():
            process.wait(30)
        for name in (*NODES, "switch"):
            ip("netns", "del", f"{prefix}-{name}", check=False)
        shutil.rmtree(made.folder, ignore_errors=True)


def until(pods: Pods, name: str, *command: str) -> str:
    """What a command in a pod says as soon as it succeeds."""
    for _ in range(120):
        done = pods.run(name, *command)
        if done.returncode == 0:
            return done.stdout
        time.sleep(0.5)
    raise AssertionError(f"{command}: {done.stdout}{done.stderr}")


@pytest.mark.slow
def test_a_pod_that_goes_hands_over_and_ends_what_it_holds(pods: Pods) -> None:
    folder = pods.folder
    (folder / "app.py").write_text(APP)
    pods.start("head", "--num-cpus", "0", "--include-dashboard", "false", "--temp-dir", str(folder / "r"))
    until(pods, "head", "ray", "health-check", "--address", f"{NODES['head']}:6379")
    pods.start("going", "--num-cpus", "1")
    done = pods.run("head", sys.executable, str(folder / "app.py"))
    assert done.returncode == 0, (done.stderr, (folder / "head.log").read_text())
    url = f"http://{NODES['going']}:8000"
    assert until(pods, "head", "curl", "-sf", f"{url}/?seconds=1").strip() == NODES["going"]
    pods.start("other", "--num-cpus", "1")
    open_request = subprocess.Popen(
        pods.inside("head", "curl", "-sfN", f"{url}/?seconds=12"), stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert open_request.stdout is not None
    first = open_request.stdout.readline()
    drained = pods.run("going", "bash", str(ROOT / "images/drain.sh"), "300")
    assert drained.returncode == 0, drained.stderr
    assert "Ray did not take the notice" not in drained.stderr, drained.stderr
    # Whoever was answered is answered to the end, by the pod that goes; and it is empty when the script ends.
    assert [first, *open_request.stdout] == [f"{NODES['going']}\n"] * 12
    assert open_request.wait(10) == 0
    assert pods.run("going", "pgrep", "-f", "[r]ay::ServeReplica").returncode == 1
    assert pods.run("going", "curl", "-sf", f"{url}/-/healthz").returncode != 0
    answered = until(pods, "head", "curl", "-sf", f"http://{NODES['other']}:8000/?seconds=1")
    assert answered.strip() == NODES["other"]


def test_a_pod_without_ray_ends_at_once() -> None:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("a process namespace needs root and unshare")
    command = ["unshare", "--pid", "--fork", "--mount-proc", "bash", str(ROOT / "images/drain.sh"), "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "no Ray node runs in this pod" in done.stderr
