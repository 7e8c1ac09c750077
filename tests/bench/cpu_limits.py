"""How much of the cores each model of a running service may compute on: cgroups, as Kubernetes' limits are.

In: the way in which the models of this process's own service have cores. Out: limits that end with the block, and the
cores that were used meanwhile, by who used them. Wants root on Linux. Does not know what a service is asked.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.capacity.simulation import PARTS, Way
from mmllm_core.errors import EnvironmentLack
from serve_apps.builder import INGRESS
from tests.serve_apps.faults import replica_processes
from tests.serve_apps.step_load import DEPLOYMENTS

PERIOD_US = 5_000
"""In which a limit is counted: less than a step of the LM, or it would come in bursts (Kubernetes' is 100 ms)."""
_MOUNTS = Path("/proc/self/mounts")


def share_of_a_core() -> float:
    """That each model can have for itself here: all of one, or half where HTTP and who asks would go short."""
    return 1.0 if len(os.sched_getaffinity(0)) >= len(PARTS) + 2 else 0.5


@contextmanager
def limited(way: Way) -> Iterator[None]:
    """Let the models of this process's service, one replica each, take turns on a core (`packed`) or have a share each.

    Raises:
        EnvironmentLack: this machine lets nobody set limits, or there are other replicas than one of each.
    """
    pids = _models()
    groups = (
        {"all": (1.0, list(pids))}
        if way == "packed"
        else {part: (share_of_a_core(), [pid]) for pid, part in pids.items()}
    )
    with _groups(groups):
        yield


@dataclass
class CoresUsed:
    """Cores that were used on average from when this was made until `told`, by who used them."""

    def __post_init__(self) -> None:
        self._models = _models()
        self._began, self._before = time.perf_counter(), self._seconds()

    def told(self) -> dict[str, float]:
        """By modality; `http` is Serve's proxy and the ingress, `asking` this process, `ray` the rest."""
        passed, now = time.perf_counter() - self._began, self._seconds()
        return {name: (seconds - self._before[name]) / passed for name, seconds in now.items()}

    def _seconds(self) -> dict[str, float]:
        me, ingress = psutil.Process(), {process.pid for process in replica_processes(INGRESS)}
        total = dict.fromkeys((*PARTS, "http", "ray"), 0.0) | {"asking": sum(me.cpu_times()[:2])}
        for process in me.children(recursive=True):
            with suppress(psutil.Error):
                http = process.pid in ingress or "ProxyActor" in " ".join(process.cmdline())
                total[self._models.get(process.pid, "http" if http else "ray")] += sum(process.cpu_times()[:2])
        return total


def _models() -> dict[int, str]:
    """Modalities by the process of their replica."""
    found = {part: [process.pid for process in replica_processes(name)] for part, name in DEPLOYMENTS.items()}
    if any(len(pids) != 1 for pids in found.values()):
        raise EnvironmentLack(f"one replica of each model is wanted, and processes are {found}: deploy it anew")
    return {pids[0]: part for part, pids in found.items()}


@contextmanager
def _groups(wanted: Mapping[str, tuple[float, Sequence[int]]]) -> Iterator[None]:
    """Control groups that end with the block: cores of each, which they have before all others, and processes."""
    made: list[Path] = []
    try:
        top, unified = _mounted()
        if unified:
            (top / "cgroup.subtree_control").write_text("+cpu")
        for name, (cores, pids) in wanted.items():
            folder = top / f"mmllm-bench-{os.getpid()}-{name}"
            folder.mkdir()
            made.append(folder)
            quota_us = round(cores * PERIOD_US)
            if unified:
                (folder / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
                (folder / "cpu.weight").write_text("10000")
            else:
                (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
                (folder / "cpu.shares").write_text("262144")
            for pid in pids:
                (folder / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        _end(made)
        raise EnvironmentLack(
            f"cores of a process cannot be limited here ({error}): run this as root on Linux, outside of a container"
        ) from error
    try:
        yield
    finally:
        _end(made)


def _end(made: Sequence[Path]) -> None:
    for folder in made:
        with suppress(OSError):
            for pid in (folder / "cgroup.procs").read_text().split():
                with suppress(OSError):  # it has ended
                    (folder.parent / "cgroup.procs").write_text(pid)
            folder.rmdir()


def _mounted() -> tuple[Path, bool]:
    """Where the controller of CPUs is mounted, and whether it is the unified one (cgroup v2)."""
    unified = None
    for line in _MOUNTS.read_text(encoding="utf-8").splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(place), False
        if kind == "cgroup2":
            unified = Path(place)
    if unified is None:
        raise FileNotFoundError("no control groups are mounted")
    return unified, True
