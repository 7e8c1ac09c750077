"""Training metrics as JSON lines, and a progress bar that follows them.

Workers write, the driver reads: a log is a file on storage that both see. Each line is an object with `step`
and whatever else was measured then.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()


def progress_bar() -> Progress:
    """The bar that all jobs show."""
    return Progress(
        TextColumn("  {task.description:<28}"),
        BarColumn(bar_width=30),
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

    def write(self, **values: Any) -> None:
        """Append one line, visible to readers at once."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; none if it does not exist yet."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@contextmanager
def following(path: Path, total: int, description: str) -> Iterator[None]:
    """Show a bar that follows the `step` and `loss` of a log while the block runs.

    A line with `phase` names what goes on between steps (loading, evaluating).
    """
    ended = threading.Event()

    def follow(progress: Progress) -> None:
        task = progress.add_task(description, total=total, note="starting")
        while True:
            last_round = ended.wait(0.5)
            lines = read_metrics(path)
            steps = [line for line in lines if "step" in line]
            note = lines[-1].get("phase", "") if lines else "starting"
            if lines and "loss" in lines[-1]:
                note = f"loss {lines[-1]['loss']:.3f}"
            progress.update(task, completed=steps[-1]["step"] if steps else 0, note=note)
            if last_round:
                return

    with progress_bar() as progress:
        thread = threading.Thread(target=follow, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=5)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds passed so far, to a tenth."""
        return round(time.monotonic() - self._start, 1)
