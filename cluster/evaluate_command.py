"""`mmllm evaluate`: what a bundle answers, measured on held-out questions.

Options in, a table out; the work is done by `train_jobs.evaluate`.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

console = Console()


def evaluate(
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle; the last one if not given.")] = None,
    questions: Annotated[int, typer.Option(help="Test questions to ask; 0 asks all.", min=0)] = 300,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log of every worker.")] = False,
) -> None:
    """Ask a bundle held-out questions and print its accuracy by kind of question, with 95% intervals."""
    from cluster.local import local_ray
    from mmllm_core.bundle import Bundle
    from train_jobs.evaluate import evaluate as score

    opened = Bundle.open(bundle) if bundle else Bundle.latest()
    with local_ray(verbose=verbose):
        scores, baseline = score(opened, limit=questions or None, workers=workers)
    table = Table("kind", "asked", "always the commonest", opened.info.name, box=None, padding=(0, 2))
    for kind, found in scores.items():
        table.add_row(kind, str(found.asked), f"{baseline[kind].accuracy:.1%}", str(found))
    console.print(table, highlight=False)
