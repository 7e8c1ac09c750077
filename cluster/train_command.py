"""`mmllm train`: options in, the folder of what was made out; the work is `train_jobs`'."""

from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.local import Verbose, local_ray
from mmllm_core.errors import ConfigError

console = Console()


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A name such as embedded-clip or embedded-instruct, or a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of the recipe to change, as key=value.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run, whose recipe is remembered, from its last checkpoint.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers; the most, where --min-workers is less.")] = None,
    min_workers: Annotated[
        int | None, typer.Option(min=1, help="Go on with as few where the others are not to be had.")
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each worker; 1 where there are enough, if not given.")
    ] = None,
    discard: Annotated[
        bool, typer.Option("--discard", help="Remove what an interrupted run of this name has left.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train what RECIPE says; an equal run that was interrupted goes on from its last checkpoint."""
    from mmllm_core.config import ClipRecipe, parse_overrides
    from train_jobs.recipe import load_recipe

    items = list(overrides or [])
    if resume is not None and recipe is not None:
        items.insert(0, recipe)  # of a resumed run the recipe is known: all that follows are settings
    options = {"workers": workers, "min_workers": min_workers, "gpus_per_worker": gpus_per_worker}
    changes: dict[str, Any] = parse_overrides(items) | {k: v for k, v in options.items() if v is not None}
    if resume is not None:
        from train_jobs.run_folders import resumable_folder

        resumable_folder(resume)
        from train_jobs.train import resume as resume_run

        with local_ray(verbose=verbose):
            _print(resume_run(resume, changes))
        return
    if recipe is None:
        raise ConfigError("train: name a recipe such as embedded-instruct, or a run to go on with by --resume RUN")
    loaded = load_recipe(recipe, changes)
    # After what can be wrong was found: Ray and torch take seconds.
    from train_jobs.train import train as train_lm
    from train_jobs.train_clip import train_clip

    with local_ray(verbose=verbose):
        if isinstance(loaded, ClipRecipe):
            console.print(train_clip(loaded))
        else:
            _print(train_lm(loaded, discard=discard))


def _print(run: Any) -> None:
    console.print(run.bundle.folder, highlight=False, soft_wrap=True)
    console.print(f"report: {run.report}", highlight=False, soft_wrap=True)
