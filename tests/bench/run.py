"""`make bench`: every bench that this machine can run, one after another, and `RESULTS.md` of what they found.

    python -m tests.bench.run [--full] [--only NAME ...] [--minutes 20] [--into FOLDER] [--render-only]

Quick mode ends within `--minutes`: what does not fit is left out, and says so. Benches share a home of their own
(`$MMLLM_BENCH_HOME`, by default `bench` in mmllm's), in which the demo makes the bundle that some need. Each is a
process with a time limit; one that fails keeps no other from running, and its last kept figures stay. What it prints
goes to `tests/bench/results/raw/`. The exit code is 1 if a bench failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mmllm_core.models.home import home
from tests.bench.records import (
    KEPT,
    ROOT,
    Record,
    at_path,
    commit,
    gpu_name,
    last_json,
    load_records,
    this_machine,
    today,
    versions,
)
from tests.bench.registry import Bench, benches, by_name
from tests.bench.results_page import BUSY, Outcome, render

PAGE = ROOT / "RESULTS.md"
PLOTS = ROOT / "docs"
ENDINGS = "endings.json"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PATIENCE = {"quick": 3.0, "full": 6.0}
"""How many times as long as expected a bench may take: a machine without bfloat16 instructions needs three times."""
console = Console()


class Run:
    """One call of `make bench`.

    Args:
        mode: quick or full.
        minutes: that all may take; None for as long as it takes.
        folder: mmllm's home for the benches.
        kept: where records and, below `raw`, outputs go.
        page: what is written of them.
        plots: where pictures go.
    """

    def __init__(
        self,
        mode: str,
        minutes: float | None,
        folder: Path,
        kept: Path = KEPT,
        page: Path = PAGE,
        plots: Path = PLOTS,
    ):
        self.mode = mode
        self.folder = folder
        self.kept = kept
        self.page = page
        self.plots = plots
        self.ends = time.monotonic() + (minutes * 60 if minutes else float("inf"))
        self.outcomes: dict[str, Outcome] = {}
        self._commit = commit()

    def run(self, chosen: Sequence[Bench]) -> None:
        """Run benches, and the demo before the first that needs what it makes; the page is written after each."""
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as progress:
            total = progress.add_task(f"{self.mode} mode", total=sum(bench.expected(self.mode) for bench in chosen))
            for bench in chosen:
                if "bundle" in bench.needs and self.lack("bundle") and "demo" not in self.outcomes:
                    self._one(by_name(["demo"])[0], progress)
                if bench.name not in self.outcomes:
                    self._one(bench, progress)
                progress.advance(total, bench.expected(self.mode))

    def lack(self, need: str) -> str | None:
        """Why a need is not met; None if it is."""
        if need == "bundle":
            return None if self.bundle() else "there is no bundle, for the demo has not made one"
        if need == "gpu":
            return None if gpu_name() else "no GPU"
        if need == "vllm":
            return None if VLLM_PYTHON.exists() else "vLLM is not installed (make test-vllm)"
        if need == "speech":
            missing = [name for name in ("piper", "espeakng_loader", "whisper") if find_spec(name) is None]
            return f"packages are missing: {', '.join(missing)} (pip install -e '.[dev]')" if missing else None
        if need == "root":
            return None if os.geteuid() == 0 else "cores are limited by root alone"
        if need == "clear_refs":
            return None if os.access("/proc/self/clear_refs", os.W_OK) else "the kernel keeps no peak of memory here"
        raise ValueError(need)

    def bundle(self) -> Path | None:
        """The bundle that the demo has left."""
        latest = self.folder / "bundles" / "latest"
        if not latest.exists():
            return None
        found = latest.with_name(latest.read_text(encoding="utf-8").strip())
        return found if (found / "bundle.json").exists() else None

    def _one(self, bench: Bench, progress: Progress) -> None:
        began = time.monotonic()
        outcome = self._measure(bench, progress)
        if outcome.status == "measured":
            outcome = _with(outcome, seconds=time.monotonic() - began)
        self.outcomes[bench.name] = outcome
        colour = {"measured": "green", "failed": "red", "left out": "yellow"}[outcome.status]
        why = f": {outcome.reason}" if outcome.reason else ""
        console.print(
            f"[{colour}]{outcome.status:9}[/{colour}] {bench.name:16} {time.monotonic() - began:5.0f} s{why}",
            highlight=False,
        )
        write_page(self.outcomes, self.kept, self.page)

    def _measure(self, bench: Bench, progress: Progress) -> Outcome:
        def ended(status: str, reason: str = "") -> Outcome:
            return Outcome(status, today(), self.mode, self._commit, reason)  # type: ignore[arg-type]

        given = bench.arguments(self.mode)
        if given is None:
            return ended("left out", "it takes longer than the quick mode has: ARGS=--full runs it")
        if lacks := [reason for need in bench.needs if (reason := self.lack(need))]:
            return ended("left out", "; ".join(lacks))
        left = self.ends - time.monotonic()
        if bench.expected(self.mode) > left:
            return ended("left out", "the time that all benches have was up")
        arguments = [*given]
        for need, more in (bench.if_there or {}).items():
            arguments += [] if self.lack(need) else more
        places = {
            "home": self.folder,
            "bundle": self.bundle() or "",
            "plots": self.plots,
            "vllm": VLLM_PYTHON,
        }
        command = ["-m", bench.module, *(argument.format_map(places) for argument in arguments)]
        busy = psutil.cpu_percent(interval=1.0) / 100
        if busy > BUSY:
            console.print(f"[yellow]other work takes {busy:.0%} of this machine: figures are marked[/yellow]")
        limit = min(left, PATIENCE[self.mode] * bench.expected(self.mode) + 60)
        raw = self.kept / "raw"
        task = progress.add_task(f"  {bench.name}", total=bench.expected(self.mode))
        began = time.monotonic()
        try:
            code = call(command, self.folder, raw / bench.name, limit, lambda s: progress.update(task, completed=s))
        finally:
            progress.remove_task(task)
        took = time.monotonic() - began
        log = f"see {os.path.relpath(raw / bench.name, ROOT)}.log"
        if code is None:
            if limit == left:
                return ended("left out", f"the time that all benches have was up when it had run for {took:.0f} s")
            return ended("failed", f"it took longer than {took:.0f} s and was ended, {log}")
        printed = last_json((raw / f"{bench.name}.out").read_text(encoding="utf-8", errors="replace"))
        if code not in (0, 1) or printed is None:  # 1: a target is missed
            return ended("failed", f"exit code {code}{'' if code else ' without figures'}, {log}")
        figures = {f.path: value for f in bench.figures if (value := at_path(printed, f.path)) is not None}
        if not figures:
            return ended("failed", f"none of its figures are in what it printed, {log}")
        shown = " ".join(["python", *command]).replace(str(self.folder), "HOME").replace(f"{ROOT}/", "")
        Record(
            bench.name,
            self.mode,  # type: ignore[arg-type]
            today(),
            this_machine(),
            figures,
            versions(),
            self._commit,
            shown,
            round(took, 1),
            round(busy, 2),
        ).save(self.kept)
        return ended("measured")


def call(
    command: Sequence[str], folder: Path, output: Path, limit: float, tick: Callable[[float], object]
) -> int | None:
    """Run a program of ours to its end; what it prints goes to `output` with `.out`, what it complains to `.log`.

    Args:
        folder: its `MMLLM_HOME`.
        limit: seconds after which it is ended, with all that it started.
        tick: told the seconds since it began, twice a second.

    Returns:
        Its exit code, or None if it was ended.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    # A service or feature store of the user's own is no part of a measurement.
    left_out = {"RAY_ADDRESS", "MMLLM_FEATURES"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {
        "MMLLM_HOME": str(folder),
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
    }
    with output.with_suffix(".out").open("w") as out, output.with_suffix(".log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=out, stderr=log, start_new_session=True
        )
        began = time.monotonic()
        try:
            while (code := running.poll()) is None:
                if time.monotonic() - began > limit:
                    return None
                tick(time.monotonic() - began)
                time.sleep(0.5)
            return code
        finally:
            if running.poll() is None:
                end(running)


def end(running: "subprocess.Popen[bytes]") -> None:
    """End a process with all that it started, those in sessions of their own too."""
    started = psutil.Process(running.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        running.wait(20)
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    running.kill()
    running.wait()


def read_endings(kept: Path = KEPT) -> dict[str, Outcome]:
    """How every bench last ended."""
    file = kept / ENDINGS
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: Outcome(**outcome) for name, outcome in values.items()}


def write_page(new: dict[str, Outcome], kept: Path = KEPT, page: Path = PAGE) -> None:
    """Keep how benches ended, and write the page anew."""
    endings = read_endings(kept) | new
    if new:
        kept.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: asdict(outcome) for name, outcome in sorted(endings.items())}, indent=2)
        (kept / ENDINGS).write_text(text + "\n", encoding="utf-8")
    page.write_text(render(benches(), load_records(kept), endings), encoding="utf-8")


def _with(outcome: Outcome, seconds: float) -> Outcome:
    return Outcome(**(asdict(outcome) | {"seconds": round(seconds, 1)}))


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything at full length: hours on two cores")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(b.name for b in benches())}")
    parser.add_argument("--minutes", type=float, help="that all may take; 20 in quick mode")
    parser.add_argument("--render-only", action="store_true", help="write RESULTS.md of the kept figures, run nothing")
    parser.add_argument(
        "--into", type=Path, help="keep records, pictures and page here, to try benches: not the project's"
    )
    options = parser.parse_args()
    try:
        chosen = by_name(options.only) if options.only else list(benches())
    except ValueError as error:
        parser.error(str(error))
    if options.render_only:
        write_page({})
        return
    mode = "full" if options.full else "quick"
    folder = Path(os.environ.get("MMLLM_BENCH_HOME") or home() / "bench").absolute()
    minutes = options.minutes or (20 if mode == "quick" else None)
    if into := options.into and options.into.absolute():
        into.mkdir(parents=True, exist_ok=True)
        run = Run(mode, minutes, folder, into, into / PAGE.name, into)
    else:
        run = Run(mode, minutes, folder)
    try:
        run.run(chosen)
    except KeyboardInterrupt:
        console.print("stopped; what was measured is kept")
        sys.exit(130)
    failed = [name for name, outcome in run.outcomes.items() if outcome.status == "failed"]
    console.print(f"{run.page} is written" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
