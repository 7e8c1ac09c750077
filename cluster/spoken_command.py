"""`mmllm evaluate-spoken`: options in, tables out; the work is done by `train_jobs.evaluate_spoken`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.evaluate_command import require_writable
from cluster.local import Verbose, local_ray
from mmllm_core.evaluation.speech_synthesis import SpeakerName

if TYPE_CHECKING:
    from mmllm_core.evaluation.spoken import SpokenReport, WrongAnswers

console = Console()

_MISHEARINGS_SHOWN = 10


def evaluate_spoken(
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle; the last one if not given.")] = None,
    questions: Annotated[int, typer.Option(help="Test questions to ask; 0 asks all.", min=0)] = 300,
    speaker: Annotated[SpeakerName, typer.Option(help="piper: near to a person. espeak: a machine, many voices.")] = (
        SpeakerName.PIPER
    ),
    workers: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of the questions, and of how each is spoken.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Write the numbers and every question to this JSON file.")] = None,
    verbose: Verbose = False,
) -> None:
    """Ask a bundle held-out questions typed and spoken, and say what hearing costs."""
    from mmllm_core.bundle import Bundle
    from mmllm_core.evaluation.speech_synthesis import require_speaker

    if save is not None:
        require_writable(save)
    require_speaker(speaker)
    opened = Bundle.open(bundle) if bundle else Bundle.latest()
    from train_jobs.evaluate_spoken import SpokenOptions
    from train_jobs.evaluate_spoken import evaluate_spoken as ask_aloud

    with local_ray(verbose=verbose):
        report = ask_aloud(opened, SpokenOptions(questions or None, speaker, workers, seed))
    if save is not None:
        told = {"bundle": opened.info.name, "speaker": speaker.value, "seed": seed} | report.to_json()
        save.write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")
    print_report(report)


def print_report(report: "SpokenReport") -> None:
    """Print accuracy by form and kind, word errors, where wrong answers come from, and mishearings."""
    table = Table("kind", "asked", "typed", "spoken, all heard", "spoken", box=None, padding=(0, 1))
    scores = report.scores
    for kind, typed in scores["typed"].items():
        shares = [str(scores[form][kind]) for form in ("typed", "recognised", "spoken")]
        table.add_row(kind, str(typed.asked), *shares)
    console.print(table, highlight=False)
    errors = report.word_errors
    console.print(
        f"\nword error rate {errors.rate:.1%}: {errors.substitutions} words taken for others, {errors.deletions} not "
        f"heard, {errors.insertions} heard that nobody said, of {errors.words}",
        highlight=False,
        soft_wrap=True,
    )
    rightly = report.scores_of_rightly_heard
    overall = next(iter(rightly.values()))
    console.print(
        f"{overall.asked} of {len(report.hearings)} questions heard rightly; of these {overall.accuracy:.1%} answered "
        "rightly",
        highlight=False,
        soft_wrap=True,
    )
    console.print("wrong answers to spoken questions:", highlight=False)
    for cause, wrong in (
        ("a word heard wrongly", report.heard_wrongly_and_wrong),
        ("every word heard", report.heard_rightly_and_wrong),
    ):
        console.print(f"  {cause}: {_told(wrong)}", highlight=False)
    heard = report.mishearings.most_common(_MISHEARINGS_SHOWN)
    if heard:
        table = Table("said", "heard", "times", box=None, padding=(0, 2))
        for (said, taken), times in heard:
            table.add_row(escape(said or "(nothing)"), escape(taken or "(nothing)"), str(times))
        console.print()
        console.print(table, highlight=False)


def _told(wrong: "WrongAnswers") -> str:
    return f"{wrong.wrong}, of which {wrong.right_when_typed} answered rightly when typed"
