"""Training metrics as JSON lines, and a progress bar and a tracker that follow them.

Workers write, the driver reads: a log is a file on storage that both see. A line is an object: of a step (`step`,
`loss` and whatever else was measured then), of a `phase` between steps, or of an `event` (resumed, checkpoint, ...).
"""

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from train_jobs.trackers import Tracker

console = Console()


def progress_bar() -> Progress:
    """The bar that all jobs show."""
    return Progress(
        TextColumn("  {task.description:<22}"),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
    )


class MetricsLog:
    """Appends JSON lines to `path`."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
            with path.open("ab") as stream:
                stream.write(b"\n")  # a writer died within a line: what follows shall not be lost with it

    def write(self, **values: Any) -> None:
        """Append one line, visible to readers at once."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")


class MetricsReader:
    """Reads a log that is being written: each whole line once."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0

    def new_lines(self) -> list[dict[str, Any]]:
        """Whole lines since the last call, all of them where the log was begun anew; broken ones are left out."""
        try:
            with self._path.open("rb") as stream:
                if stream.seek(0, os.SEEK_END) < self._offset:
                    self._offset = 0
                stream.seek(self._offset)
                text = stream.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line for piece in whole.splitlines() if (line := _parsed(piece)) is not None]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; none if it does not exist yet."""
    return MetricsReader(path).new_lines()


def step_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of steps, each step once: a resumed run goes back, and what it did before it went back is void."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        if not _is_step(line):
            continue
        while kept and kept[-1]["step"] >= line["step"]:
            kept.pop()
        kept.append(line)
    return kept


@contextmanager
def following(path: Path, total: int, description: str, tracker: Tracker | None = None) -> Iterator[None]:
    """Show a bar that follows the steps of a log while the block runs, and give each step's numbers to a tracker.

    A line with `phase` names what goes on between steps (loading, evaluating). A tracker that fails ends nothing: the
    log holds all that it would have been given.
    """
    ended = threading.Event()
    reader = MetricsReader(path)

    def follow(progress: Progress) -> None:
        task = progress.add_task(description, total=total, note="starting")
        tell = tracker
        while True:
            last_round = ended.wait(0.5)
            for line in reader.new_lines():
                if _is_step(line):
                    progress.update(task, completed=line["step"], note=step_note(line))
                    tell = _tell(tell, line)
                elif "phase" in line:
                    progress.update(task, note=line["phase"])
            if last_round:
                return

    with progress_bar() as progress:
        thread = threading.Thread(target=follow, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=30)  # a tracker may have to send what is left


def step_note(line: dict[str, Any]) -> str:
    """What the bar says of a step: `loss 1.234  812 tok/s  3.1 conv/s  31% MFU  2.1 GB`, as far as it was measured."""
    parts = [f"loss {line.get('loss_ema', line['loss']):.3f}"]
    for name, form in (
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("samples_per_second", "{:.3g} conv/s"),
        ("mfu", "{:.0%} MFU"),
        ("memory_gb", "{:.1f} GB"),
    ):
        if (value := line.get(name)) is not None:
            parts.append(form.format(value))
    return "  ".join(parts)


def _tell(tracker: Tracker | None, line: dict[str, Any]) -> Tracker | None:
    """Give a step to the tracker; the tracker that goes on, or None after a failure."""
    if tracker is None:
        return None
    try:
        tracker.log(line, line["step"])
    except Exception as error:  # whatever a client of another's making raises
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        console.print(f"  the tracker failed at step {line['step']} and is given no more ({said}); {_UNHARMED}")
        return None
    return tracker


def _is_step(line: dict[str, Any]) -> bool:
    return "step" in line and "loss" in line and "event" not in line


_UNHARMED = "the run goes on, and its metrics log is whole"


def _parsed(piece: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(piece)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds passed so far, to a tenth."""
        return round(time.monotonic() - self._start, 1)
