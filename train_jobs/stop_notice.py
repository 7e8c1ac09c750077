"""Why a run must not be started again: a worker's note to those that Ray Train starts after it, and to the driver.

Ray starts workers again whatever ended them. An error of ours (a broken file, a loss that is not finite) would only
come again, so the worker that raises it leaves a notice in the run's folder, and workers that find one end at once.
"""

from pathlib import Path

_NOTICE = "stopped.txt"


def leave_notice(folder: Path, error: Exception) -> None:
    """Write why the run stopped; the first of several notices stays."""
    path = folder / _NOTICE
    if not path.exists():
        path.write_text(str(error), encoding="utf-8")


def read_notice(folder: Path) -> str | None:
    """Why the run stopped for good, or None if it did not."""
    path = folder / _NOTICE
    return path.read_text(encoding="utf-8") if path.exists() else None


def clear_notice(folder: Path) -> None:
    """Let the run go on."""
    (folder / _NOTICE).unlink(missing_ok=True)
