"""Figures that were measured, kept in the repository: one JSON file for each bench and mode under `results/`.

In: what a bench printed, and where it ran. Out: a `Record`, written or read back. The standard library alone, for
machines that have little more than torch. Does not know targets, nor how figures are shown.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "tests" / "bench" / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "ray", "deepspeed", "faster-whisper", "vllm")
Mode = Literal["quick", "full", "earlier"]
"""How a bench was run; `earlier` figures were taken from the documentation, with the machine as it named it."""


@dataclass(frozen=True)
class Record:
    """Figures of one run of a bench."""

    bench: str
    mode: Mode
    measured: str
    """The day, ISO 8601; of earlier figures, when the documentation got them."""
    machine: Mapping[str, Any]
    """`cpu`, `cores`, `memory_gb`, `bfloat16` and `gpu`; of earlier figures `as_stated` alone."""
    figures: Mapping[str, float]
    """By their path in what the bench printed."""
    versions: Mapping[str, str]
    commit: str | None = None
    command: str = ""
    seconds: float | None = None
    """That the bench took."""
    busy_before: float | None = None
    """Share of the machine's cores that other work took just before."""

    @property
    def order(self) -> tuple[str, int]:
        """Later figures come after earlier ones; on one day a full run after a quick one."""
        return self.measured, ("earlier", "quick", "full").index(self.mode)

    def save(self, folder: Path = KEPT, name: str | None = None) -> Path:
        """Write it, in place of the last one of its bench and mode."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name or f'{self.bench}.{self.mode}'}.json"
        file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return file


def load_records(folder: Path = KEPT) -> list[Record]:
    """All that are kept, the oldest first.

    Raises:
        ValueError: a file is no record; the message names it.
    """
    found = []
    for file in sorted(folder.glob("*.*.json")):
        try:
            found.append(Record(**json.loads(file.read_text(encoding="utf-8"))))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: no record of a bench ({error}): remove it, or run the bench again") from error
    return sorted(found, key=lambda record: record.order)


def at_path(values: Any, path: str) -> float | None:
    """The number at a path of keys and list indexes, such as `closed.16.of_generate`; None if there is none.

    A key that holds a dot is not found.
    """
    for key in path.split("."):
        if isinstance(values, Mapping):
            values = values.get(key)
        elif isinstance(values, list) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        else:
            return None
    if isinstance(values, bool) or not isinstance(values, int | float):
        return None
    return float(values) if values == values else None  # NaN is no figure


def last_json(printed: str) -> Any:
    """What the last line of a bench's output holds, or None if that is not JSON."""
    lines = printed.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None


def this_machine() -> dict[str, Any]:
    """What figures depend on most."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if info.exists() else []
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = cpu.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in cpu:  # some virtual machines tell no more than the maker
        name += f" (family {cpu['cpu family']}, model {cpu['model']})"
    flags = cpu.get("flags", "").split()
    bfloat16 = next((shown for flag, shown in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")) if flag in flags), None)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"cpu": name, "cores": cores, "memory_gb": round(memory), "bfloat16": bfloat16, "gpu": gpu_name()}


def gpu_name() -> str | None:
    """CUDA's name of the first GPU, or None."""
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that is checked out, with a `+` if tracked files differ; None outside of a git checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!RESULTS.md", ":!docs", f":!{KEPT}"
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+" if changed else head


def today() -> str:
    """ISO 8601."""
    return date.today().isoformat()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
