"""Where runs of this machine leave what they leave, by name. Reads nothing of it, and loads neither torch nor Ray."""

from pathlib import Path

from mmllm_core.errors import DataError, TrainingError
from mmllm_core.models.home import home

LOG, INPUTS = "metrics.jsonl", "inputs.json"


def runs_folder() -> Path:
    """Where runs leave their logs, plots and reports."""
    return home() / "runs"


def runs_here() -> str:
    """Names of this machine's runs, for a message."""
    return ", ".join(sorted(path.parent.name for path in runs_folder().glob(f"*/{LOG}"))) or "none yet"


def run_folder(run: str | Path) -> Path:
    """A run's folder, by that or by its name among this machine's runs.

    Raises:
        DataError: there is no such run.
    """
    folder = Path(run) if Path(run).is_dir() else runs_folder() / run
    if not (folder / LOG).is_file():
        raise DataError(f"{folder}: no run is there ('{LOG}' is missing); runs of this machine: {runs_here()}")
    return folder.resolve()


def resumable_folder(name: str) -> Path:
    """The folder of a run of this machine that was started, by its name alone.

    Raises:
        TrainingError: there is no such run.
    """
    folder = runs_folder() / name
    if not (folder / INPUTS).is_file():
        raise TrainingError(f"--resume {name}: no such run; runs of this machine: {runs_here()}")
    return folder
