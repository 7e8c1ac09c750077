"""`mmllm doctor`: what this machine has, and what each lack costs."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from cluster.server import PORT_MEND, port_problem
from mmllm_core.errors import EnvironmentLack
from mmllm_core.models.home import home

State = Literal["ok", "lack", "stop"]
"""`lack` costs something, `stop` keeps the demo from running."""


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str
    state: State
    found: str
    cost: str = ""


def examine(port: int = 8000) -> Iterator[Check]:
    """Check everything; takes seconds, starts nothing, downloads nothing."""
    checks: list[Callable[[], Check]] = [_python, _torch, _memory, _disk, lambda: _port(port), _accelerator]
    for check in checks:
        yield check()
    yield from _caches()


def require_able(port: int) -> None:
    """Stop before any work when the machine cannot finish it.

    Raises:
        EnvironmentLack: the first check that says `stop`, with its mend.
    """
    for check in examine(port):
        if check.state == "stop":
            raise EnvironmentLack(f"{check.name}: {check.found}: {check.cost}")


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Check(
        "Python", "ok" if good else "stop", found, "" if good else "install Python 3.11 and make the venv anew"
    )


def _torch() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("torch", "stop", "not installed", "run 'make install'")
    import torch

    from mmllm_core.language import multiplies_bfloat16

    found = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if multiplies_bfloat16():
        return Check("torch", "ok", f"{found}, bfloat16 instructions")
    cost = "the LM is computed in float32: half as fast, in twice the memory"
    return Check("torch", "ok", f"{found}, no bfloat16 instructions", cost)


def _memory() -> Check:
    total, free = psutil.virtual_memory().total / 1e9, psutil.virtual_memory().available / 1e9
    found = f"{total:.0f} GB, {free:.0f} GB available"
    if free < 4:
        return Check("memory", "stop", found, "the demo needs 4 GB available, 8 GB without bfloat16: close something")
    return Check(
        "memory", "ok" if free >= 8 else "lack", found, "" if free >= 8 else "training may swap: 8 GB are better"
    )


def _disk() -> Check:
    place = next(p for p in (home(), *home().parents) if p.exists())
    free = shutil.disk_usage(place).free / 1e9
    if not os.access(place, os.W_OK):
        return Check("disk", "stop", f"{place} cannot be written", "point MMLLM_HOME at a folder of yours")
    enough = free >= 3
    cost = "" if enough else "the demo needs 3 GB: free space or point MMLLM_HOME elsewhere"
    return Check("disk", "ok" if enough else "stop", f"{free:.0f} GB free at {place}", cost)


def _port(port: int) -> Check:
    if problem := port_problem("127.0.0.1", port):
        return Check(f"port {port}", "stop", problem, PORT_MEND)
    return Check(f"port {port}", "ok", "free")


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Check("accelerator", "ok", names)
    return Check("accelerator", "lack", "none", "profile 'embedded' runs on the CPU; profile 'phi' needs a GPU")


def _caches() -> Iterator[Check]:
    for name, folder, cost in (
        ("fetched packages", home() / "packages", "the demo fetches about 170 MB"),
        ("trained CLIP", home() / "clip", "the demo trains it in about two minutes"),
        ("bundle", home() / "bundles" / "latest", "'make demo' makes one; 'make serve' needs one"),
    ):
        there = folder.exists()
        yield Check(name, "ok" if there else "lack", _shown(folder) if there else "none yet", "" if there else cost)


def _shown(path: Path) -> str:
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
