"""`mmllm evaluate`: what a bundle answers about held-out images, and what became of its plain text.

Options in, a table out; the work is done by `train_jobs.evaluate` and `mmllm_core.evaluation`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.local import Verbose, local_ray
from mmllm_core.errors import ConfigError

if TYPE_CHECKING:
    from mmllm_core.bundle import Bundle

console = Console()


def evaluate(
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle; the last one if not given.")] = None,
    questions: Annotated[int, typer.Option(help="Questions to ask; 0 asks all.", min=0)] = 300,
    file: Annotated[
        Path | None, typer.Option(help="Questions of your own instead, in LLaVA's format, with their right answers.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of their images; the file's own if not given.")] = None,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    save: Annotated[
        Path | None, typer.Option(help="File for questions, right answers and answers, as JSON lines.")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Measure instead what tuning did to plain text, without images.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Ask a bundle held-out questions and print its accuracy by kind of question, with 95% intervals."""
    from mmllm_core.bundle import Bundle

    if text and (save or file):
        option, does = ("--save", "keeps answers") if save else ("--file", "has questions")
        raise ConfigError(f"{option}: {does} about images, and --text asks about none: leave one of them out")
    if images and not file:
        raise ConfigError("--images: is for the images of --file: name that too")
    if save:
        require_writable(save)
    opened = Bundle.open(bundle) if bundle else Bundle.latest()
    if text:
        _print_text_ability(opened)
        return
    from train_jobs.evaluate import Asked
    from train_jobs.evaluate import evaluate as ask

    asked = Asked(questions or None, file=file and file.absolute(), images=images and images.absolute())
    if file:
        asked.questions()  # a file that is none is told before Ray starts
    with local_ray(verbose=verbose):
        evaluation = ask(opened, asked, workers=workers)
    table = Table("kind", "asked", "always the commonest", opened.info.name, box=None, padding=(0, 2))
    baseline = evaluation.baseline
    for kind, found in evaluation.scores.items():
        table.add_row(kind, str(found.asked), f"{baseline[kind].accuracy:.1%}", str(found))
    console.print(table, highlight=False)
    if save:
        evaluation.save(save)
        console.print(f"answers: {save}", markup=False, highlight=False)


def _print_text_ability(bundle: "Bundle") -> None:
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
    console.print(table, highlight=False)


def require_writable(path: Path) -> None:
    """Find out before minutes of asking."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--save {path}: cannot be written: {error.strerror or error}") from error
