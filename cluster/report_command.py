"""`mmllm report`: names of runs in, the path of a page out; the work is done by `train_jobs.report`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Names of runs, or their folders.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write into; the run's own if not given.")] = None,
) -> None:
    """Write a page on a run, or on several side by side: curves, accuracy, answers, and what happened."""
    from train_jobs.run_folders import run_folder

    folders = [run_folder(run) for run in runs]
    from train_jobs.report import report as write

    with console.status("drawing"):
        page = write(folders, out)
    console.print(page, soft_wrap=True, highlight=False)
