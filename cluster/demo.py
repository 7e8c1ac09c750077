"""`mmllm demo`: the whole way once on this machine: fetch, train CLIP, embed, tune, report, serve and ask.

Each step reuses what an equal step made before, so a second run only serves and asks.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.ask import Asker, user_message
from cluster.doctor import require_able
from cluster.local import local_ray
from cluster.server import local_config, serving, wait_for_ever
from mmllm_core.bundle import Bundle
from mmllm_core.config import ClipRecipe, Recipe
from mmllm_core.data import easy_vqa
from mmllm_core.data.sample import Question
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve

SHORT: dict[str, dict[str, Any]] = {
    "embedded-clip": {"steps": 150},
    "embedded-demo": {"steps": 6, "evaluation_questions": 60},
}
"""What `--short` changes in the recipes: enough to see every part work, too little to learn well."""

console = Console()


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asks for."""

    port: int = 8000
    short: bool = False
    stay: bool = True
    verbose: bool = False


def run_demo(options: DemoOptions) -> None:
    """Run the demo; returns only if it was asked not to stay.

    Raises:
        MmllmError: any step failed; the message says what to do.
    """
    started = time.monotonic()
    require_able(options.port)
    config = local_config("embedded", options.port)
    _heading(1, "Fetch weights and data")
    profile = load_profile("embedded")
    sources: tuple[tuple[str, Callable[[], Path]], ...] = (
        ("SmolLM2-135M-Instruct", lambda: resolve(profile.language.source)),
        ("Whisper tiny.en", lambda: resolve(profile.audio.source)),
        ("easy-VQA", easy_vqa.fetch),
    )
    for name, bring in sources:
        with console.status(f"  {name}"):
            folder = bring()
        console.print(f"  {name:<24} [dim]{folder}[/dim]")
    with local_ray(verbose=options.verbose):
        bundle = _train(options)
        _heading(6, "Serve and ask")
        with ExitStack() as stack:
            with console.status("  deploying CLIP, Whisper and Phi"):
                url = stack.enter_context(serving(bundle, config))
            _ask(url)
            console.print(f"\n[bold]Done in {time.monotonic() - started:.0f} s.[/bold]")
            if options.stay:
                console.print(f"[bold]Chat page: {url}[/bold]   API: {url}/v1   Ctrl-C ends all of it.")
                wait_for_ever()


def _train(options: DemoOptions) -> Bundle:
    """Steps 2 to 5."""
    from train_jobs.embed_images import embed_recipe
    from train_jobs.recipe import load_recipe
    from train_jobs.train import train
    from train_jobs.train_clip import train_clip

    def recipe(name: str) -> Recipe | ClipRecipe:
        return load_recipe(name, SHORT[name] if options.short else {})

    _heading(2, "Train the embedded CLIP on captions")
    clip_recipe, tuning = recipe("embedded-clip"), recipe("embedded-demo")
    assert isinstance(clip_recipe, ClipRecipe)
    assert isinstance(tuning, Recipe)
    console.print(f"  CLIP weights: [dim]{train_clip(clip_recipe)}[/dim]")
    _heading(3, "Precompute CLIP features")
    console.print(f"  {embed_recipe(tuning).new} images were new to the feature store")
    _heading(4, "Tune the LM: QLoRA and connector, DeepSpeed ZeRO-2, two workers")
    run = train(tuning, discard=True)  # a demo that was broken off and is now run with other options
    console.print(f"  bundle: [dim]{run.bundle.folder}[/dim]")
    _heading(5, "Held-out easy-VQA test questions")
    table = Table("kind", "asked", "always the commonest", "before tuning", "after tuning", box=None, padding=(0, 2))
    for kind, after in run.after.items():
        row = [f"{scores[kind].accuracy:.1%}" for scores in (run.baseline, run.before, run.after)]
        table.add_row(kind, str(after.asked), *row)
    console.print(table)
    console.print(f"  report: [dim]{run.report}[/dim]")
    return run.bundle


def _ask(url: str) -> None:
    """A text, an image and a spoken question."""
    asker = Asker(url)
    console.print(f"  {url}/v1/chat/completions, model '{asker.model}'")
    text = "What is the capital of France?"
    answer = asker.ask([user_message(text)], max_tokens=64)
    console.print(f"  [bold]text  [/bold] {text} -> [green]{answer.text}[/green]")
    question = _picture_question()
    answer = asker.ask([user_message(question.question, image=question.image)], max_tokens=64)
    shown = f"{question.question} ({question.image.name}, in truth {question.answer})"
    console.print(f"  [bold]image [/bold] {shown} -> [green]{answer.text}[/green]")
    text = "Is this good advice?"
    answer = asker.ask([user_message(text, audio=spoken_clip())], max_tokens=64)
    console.print(f'  [bold]speech[/bold] "{" ".join(answer.transcripts)}" {text} -> [green]{answer.text}[/green]')


def spoken_clip() -> Path:
    """A recording of real speech that Gradio ships for its own examples."""
    import gradio

    return Path(gradio.__file__).parent / "media_assets" / "audio" / "heath_ledger.mp3"


def _picture_question() -> Question:
    """A question about colour, from the test split."""
    return next(q for q in easy_vqa.held_out_questions(easy_vqa.fetch(), None) if q.kind == "colour")


def _heading(number: int, title: str) -> None:
    console.print(f"\n[bold blue]{number}/6[/bold blue] [bold]{title}[/bold]")
