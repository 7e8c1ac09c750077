"""`mmllm benchmark`: names of benchmarks in, a table out; the work is done by `train_jobs.benchmarks`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()


def benchmark(
    tasks: Annotated[
        list[str],
        typer.Argument(metavar="TASK...", help="vqav2, gqa, textvqa, pope, mmbench, or a task of lmms-eval's own."),
    ],
    url: Annotated[
        str, typer.Option("--base-url", "--url", help="Where the assistant is served.")
    ] = "http://127.0.0.1:8000",
    limit: Annotated[int | None, typer.Option(help="Ask only the first so many of each task.", min=1)] = None,
    concurrent: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 8,
    lmms_eval: Annotated[
        Path | None, typer.Option(help="lmms-eval's program; else MMLLM_LMMS_EVAL names it, or the PATH has it.")
    ] = None,
    own_tasks: Annotated[Path | None, typer.Option(help="Folder with YAML files of more tasks.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make for answers and results.")] = None,
) -> None:
    """Put public benchmarks to a running assistant, by lmms-eval over the API, and print their scores."""
    from cluster.ask import Asker
    from mmllm_core.errors import ConfigError
    from train_jobs.benchmarks import BenchmarkRun, find_program, results_folder, run_benchmarks

    if out is not None and out.exists():
        raise ConfigError(f"--out {out}: exists already: name a folder that can be made")
    program = find_program(lmms_eval)
    model = Asker(url).model
    folder = out or results_folder(model)
    run = BenchmarkRun(tuple(tasks), url, model, limit, concurrent, own_tasks)
    with console.status(f"lmms-eval asks '{model}'; what it says: {folder / 'lmms-eval.log'}"):
        scores = run_benchmarks(run, program, folder)
    table = Table("task", "asked", "metric", "value", "± standard error", box=None, padding=(0, 2))
    for score in scores:
        error = "" if score.standard_error is None else f"{score.standard_error:.4f}"
        table.add_row(escape(score.task), str(score.asked or ""), escape(score.metric), f"{score.value:.4f}", error)
    console.print(table, highlight=False)
    console.print(f"answers and results: {folder}", markup=False, highlight=False, soft_wrap=True)
