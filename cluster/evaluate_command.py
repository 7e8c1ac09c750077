"""`mmllm evaluate`: what a bundle answers about held-out images, and what became of its plain text.

Options in, a table out; the work is done by `train_jobs.evaluate` and `mmllm_core.evaluation`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mmllm_core.bundle import Bundle

console = Console()


def evaluate(
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle; the last one if not given.")] = None,
    questions: Annotated[int, typer.Option(help="Test questions to ask; 0 asks all.", min=0)] = 300,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    text: Annotated[
        bool, typer.Option("--text", help="Measure instead what tuning did to plain text, without images.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log of every worker.")] = False,
) -> None:
    """Ask a bundle held-out questions and print its accuracy by kind of question, with 95% intervals."""
    from mmllm_core.bundle import Bundle

    opened = Bundle.open(bundle) if bundle else Bundle.latest()
    console.print(
        _text_table(opened) if text else _answer_table(opened, questions or None, workers, verbose), highlight=False
    )


def _answer_table(bundle: "Bundle", limit: int | None, workers: int, verbose: bool) -> Table:
    from cluster.local import local_ray
    from train_jobs.evaluate import evaluate as score

    with local_ray(verbose=verbose):
        scores, baseline = score(bundle, limit=limit, workers=workers)
    table = Table("kind", "asked", "always the commonest", bundle.info.name, box=None, padding=(0, 2))
    for kind, found in scores.items():
        table.add_row(kind, str(found.asked), f"{baseline[kind].accuracy:.1%}", str(found))
    return table


def _text_table(bundle: "Bundle") -> Table:
    import torch

    from mmllm_core.evaluation.text_ability import compare

    with console.status("asking without images, tuned and untuned"):
        tuned, untuned = compare(bundle, "cuda" if torch.cuda.is_available() else "cpu")
    table = Table("plain text", "untuned", bundle.info.name, "change", box=None, padding=(0, 2))
    table.add_row(
        f"right of {tuned.asked} questions", str(untuned.right), str(tuned.right), f"{tuned.right - untuned.right:+d}"
    )
    table.add_row(
        "loss per token of prose",
        f"{untuned.loss_per_token:.3f}",
        f"{tuned.loss_per_token:.3f}",
        f"{tuned.loss_change(untuned):+.1%}",
    )
    return table
