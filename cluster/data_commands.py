"""`mmllm data`: bring training data here, and find what is wrong with it. The work is done in `mmllm_core.data`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from mmllm_core.errors import ConfigError, MmllmError

if TYPE_CHECKING:
    from mmllm_core.config import Profile
    from mmllm_core.data.download import Progress as Told
    from mmllm_core.data.lint import LintReport
    from mmllm_core.data.token_count import Rendering

data = typer.Typer(help="Bring training data here, and check it.", no_args_is_help=True)
console = Console() if sys.stdout.isatty() else Console(width=1_000)  # a pipe wants a line a row


@data.command()
def prepare(
    dataset: Literal["llava-instruct-150k", "llava-pretrain-558k", "easy-vqa"],
    folder: Annotated[Path | None, typer.Option(help="Where to put it; by default under ~/.cache/mmllm.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the hub's repository.")] = "main",
    images: Annotated[bool, typer.Option(help="Fetch the images too (LLaVA-Instruct: COCO, 19 GB).")] = True,
) -> None:
    """Fetch a dataset; run it again to go on after a broken download."""
    if dataset == "easy-vqa":
        if folder or revision != "main" or not images:
            raise ConfigError(
                "easy-vqa comes whole from a package, pinned by hash, into MMLLM_HOME: give no --folder, --revision or "
                "--no-images"
            )
        from mmllm_core.data import easy_vqa

        console.print(f"{easy_vqa.fetch()}\nin a recipe: dataset: easy-vqa", highlight=False, soft_wrap=True)
        return
    from mmllm_core.data.prepare import prepare as prepare_llava

    with _download_bar(dataset) as progress:
        ready = prepare_llava(dataset, folder, revision=revision, with_images=images, progress=progress)
    console.print(
        f"{ready.named - ready.absent} of {ready.named} images are there\n"
        f"in a recipe: dataset: llava, file: {ready.file}, images: {ready.images}\n"
        f"check it:    mmllm data lint {ready.file} --images {ready.images}",
        highlight=False,
        soft_wrap=True,
    )
    if ready.absent and images:
        raise typer.Exit(1)


@data.command()
def lint(
    file: Annotated[Path, typer.Argument(help="LLaVA-format JSON or JSON Lines, or chat JSON Lines.")],
    images: Annotated[Path | None, typer.Option(help="Folder of its images; the file's own if not given.")] = None,
    profile: Annotated[str, typer.Option(help="Whose tokenizer, image tokens and context are meant.")] = "embedded",
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer, instead of the profile's.")] = None,
    image_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens an image takes; else the profile's.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens a row may take; else the profile's.")] = None,
    lengths: Annotated[bool, typer.Option(help="Whether to check lengths, for which a tokenizer is loaded.")] = True,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image whole: slower, finds all damage.")
    ] = False,
    show: Annotated[int, typer.Option(min=0, help="Print so many rendered rows, supervised tokens coloured.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes for images and lengths; else all cores.")
    ] = None,
) -> None:
    """Find what is wrong with a file of conversations. Exit code: 0 nothing, 1 something, 2 it cannot be checked."""
    from mmllm_core.data.lint import LintOptions
    from mmllm_core.data.lint import lint as run_lint
    from mmllm_core.models.profile import load_profile

    try:
        loaded = load_profile(profile)
        rendering = _rendering(loaded, tokenizer, image_tokens, max_length) if lengths or show else None
        options = LintOptions(
            images=images or file.absolute().parent,
            rendering=rendering if lengths else None,
            decode=decode,
            max_pixels=loaded.vision.max_pixels,
            workers=workers or os.cpu_count() or 1,
        )
        with console.status(f"checking {file.name}") as status:
            report = run_lint(file, options, lambda rows: status.update(f"checking {file.name}: {rows} rows"))
        _print_report(report, rendering if lengths else None)
        if show and rendering:
            _print_samples(file, rendering, show)
    except MmllmError as error:
        Console(stderr=True).print(f"[bold red]mmllm:[/bold red] {escape(_plain(str(error)))}", soft_wrap=True)
        raise typer.Exit(2) from error
    if not report.clean:
        raise typer.Exit(1)


def _rendering(
    profile: "Profile", tokenizer: Path | None, image_tokens: int | None, max_length: int | None
) -> "Rendering":
    from mmllm_core.data.token_count import Rendering
    from mmllm_core.models.resolve import resolve
    from train_jobs.vision_shape import vision_shape

    if tokenizer and not tokenizer.is_dir():
        raise ConfigError(f"--tokenizer {tokenizer}: no such folder")
    return Rendering(
        tokenizer=tokenizer or resolve(profile.language.source, weights=False),
        n_image_tokens=image_tokens or profile.connector.n_tokens(vision_shape(profile.vision).n_patches),
        max_length=max_length or profile.language.context_length,
    )


def _print_report(report: "LintReport", rendering: "Rendering | None") -> None:
    checked = f"{report.rows} rows ({report.format_name}), {report.images} images"
    if rendering:
        checked += f", at most {rendering.max_length} tokens a row, {rendering.n_image_tokens} an image"
    console.print(checked, highlight=False)
    if report.clean:
        console.print("[green]nothing is wrong[/green]")
        return
    table = Table("", "count", "first", box=None, padding=(0, 2))
    table.columns[1].justify = "right"
    for finding in sorted(report.findings.values(), key=lambda finding: -finding.count):
        first = "\n".join(
            f"row {example.row}{f' ({example.id})' if example.id else ''}: {example.detail}"
            for example in finding.examples
        )
        table.add_row(Text(finding.kind, "red"), str(finding.count), Text(_plain(first)))
    console.print(table)


def _print_samples(file: Path, rendering: "Rendering", n: int) -> None:
    """Supervised tokens are green, and between guillemets where colours do not show."""
    from mmllm_core.data.lint import rendered_samples, shown_pieces
    from mmllm_core.language import load_tokenizer

    tokenizer = load_tokenizer(rendering.tokenizer)
    coloured = console.is_terminal and not console.no_color
    for row, id, rendered in islice(rendered_samples(file, tokenizer, rendering), n):
        title = (
            f"row {row}{f' ({id})' if id else ''}: {len(rendered.input_ids)} tokens, {rendered.n_supervised} supervised"
        )
        console.print(Text(f"── {_plain(title)}", "bold"))
        text = Text()
        for piece, supervised in shown_pieces(rendered, tokenizer):
            marked = f"«{piece}»" if supervised and not coloured else piece
            text.append(marked, "bold green" if supervised else "dim")
        console.print(text)


def _plain(text: str) -> str:
    """Text that any terminal takes: control characters and undecodable bytes are spelled out."""
    safe = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in safe)


@contextmanager
def _download_bar(what: str) -> Iterator["Told"]:
    columns = (TextColumn("  {task.description}"), BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, visible=False)
        yield lambda here, total: bar.update(task, completed=here, total=total, visible=True)
