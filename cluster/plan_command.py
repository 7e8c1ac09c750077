"""`mmllm plan RECIPE`, beside `mmllm plan serve`: options in, tables out; the arithmetic is `train_jobs.plan`'s."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from cluster.plan_serve_command import plan_serve

if TYPE_CHECKING:
    from train_jobs.plan import Choice, Plan

console = Console() if sys.stdout.isatty() else Console(width=1_000)  # a pipe wants a line a row

_PARTS = {
    "runtime": "libraries, or CUDA context",
    "mapped": "file of the LM, mapped",
    "weights": "frozen weights",
    "trainable": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer, master copy",
    "activations": "activations",
    "logits": "logits",
    "working": "backward pass of a layer",
    "bucket": "gradient exchange",
    "slack": "allocator",
    "update": "optimizer's step beyond that",
}


class _RecipeUnlessNamed(TyperGroup):
    """`plan RECIPE` is `plan recipe RECIPE`: what names no command of the group is a recipe, or an option for one."""

    default = "recipe"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


plan_app = typer.Typer(
    cls=_RecipeUnlessNamed,
    no_args_is_help=True,
    help="What it costs before it runs: training (`plan RECIPE`, or `plan recipe RECIPE`), and serving (`plan serve`).",
)
plan_app.command("serve")(plan_serve)


@plan_app.command("recipe")
def plan(
    recipe: Annotated[str, typer.Argument(help="A name such as embedded-instruct, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change, as key=value.")] = None,
    gpu: Annotated[str, typer.Option(help="H100, H200, A100-80GB, L4, RTX-4090 and others, or cpu: here.")] = "H100",
    gpus: Annotated[int | None, typer.Option(min=1, help="Workers, one each; else the recipe's.")] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the peak that training reaches; 0.3 if not given.")
    ] = None,
    lm_shape: Annotated[
        Path | None, typer.Option(help="The LM's config.json (a tokenizer beside it is used), to plan offline.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what RECIPE costs before it runs: memory of each worker, steps, tokens, hours, and what fits."""
    from mmllm_core.config import parse_overrides
    from train_jobs.recipe import load_training_recipe

    loaded = load_training_recipe(recipe, parse_overrides(overrides or []))
    from train_jobs.plan import MFU, PlanOptions
    from train_jobs.plan import plan as make_plan

    options = PlanOptions(gpu, gpus or loaded.workers, mfu=MFU if mfu is None else mfu, lm_shape=lm_shape)
    made = make_plan(loaded, options)
    if as_json:
        print(json.dumps(plan_values(made)))
        return
    _print_plan(made)


def plan_values(made: "Plan") -> dict[str, Any]:
    """A plan as JSON-serialisable values; memory in bytes."""
    return {
        "recipe": made.recipe.name,
        "accelerator": asdict(made.accelerator),
        "workers": made.options.workers,
        "parameters": made.model.n_parameters,
        "trainable": made.model.n_trainable,
        "checkpoint_bytes": made.checkpoint_bytes,
        "batches": asdict(made.batches),
        "steps": made.recipe.steps,
        "tokens_per_step": made.tokens_per_step,
        "accumulation": made.accumulation,
        "tokens": made.tokens,
        "flops": made.flops,
        "mfu": made.options.mfu,
        "hours": made.hours,
        "as_written": _choice_values(made.as_written),
        "stages": [_choice_values(choice) for choice in made.stages],
        "recommended": _choice_values(made.recommended) if made.recommended else None,
    }


def _choice_values(choice: "Choice") -> dict[str, Any]:
    return asdict(choice) | {"peak": choice.memory.total}


def _print_plan(made: "Plan") -> None:
    from train_jobs.memory_model import ACCOUNTED

    model, options, chip = made.model, made.options, made.accelerator
    console.print(
        f"{made.recipe.name} on {options.workers} x {chip.name}: {model.n_parameters / 1e6:,.1f}M parameters, "
        f"{model.n_trainable / 1e6:,.2f}M trained; a checkpoint takes {_size(made.checkpoint_bytes)}",
        highlight=False,
    )
    table = Table("memory of a worker", *(f"ZeRO-{choice.zero_stage}" for choice in made.stages), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for part, label in _PARTS.items():
        table.add_row(label, *(_size(getattr(choice.memory, part)) for choice in made.stages))
    table.add_row("[bold]peak[/bold]", *(f"[bold]{_size(choice.memory.total)}[/bold]" for choice in made.stages))
    console.print(table, highlight=False)
    console.print(
        f"at micro-batch {made.recipe.micro_batch} ({made.accumulation} a step), "
        f"each of up to {made.batches.longest} tokens"
        + (", gradient checkpointing" if made.recipe.gradient_checkpointing else ""),
        highlight=False,
    )
    for choice in made.stages:
        if choice.refused:
            console.print(escape(f"ZeRO-{choice.zero_stage}: no: {choice.refused}"), highlight=False)
    console.print(
        f"{made.recipe.steps:,} steps x {made.tokens_per_step:,.0f} tokens = {made.tokens:,.0f} tokens, "
        f"{made.flops:.3g} operations, {_duration(made.hours)} at {options.mfu:.0%} of "
        f"{options.workers} x {chip.flops / 1e12:,.4g} TFLOP/s ({chip.source})",
        highlight=False,
    )
    console.print(escape(f"tokens: {made.batches.source}"), highlight=False)
    if model.model_type not in ACCOUNTED:
        console.print(escape(f"layers of '{model.model_type}' are counted as Llama's"), highlight=False)
    console.print(_advice(made.as_written, made.recommended, chip.name), highlight=False)


def _advice(as_written: "Choice", recommended: "Choice | None", gpu: str) -> str:
    own = f"as written (zero.stage={as_written.zero_stage} micro_batch={as_written.micro_batch})"
    verdict = "does not fit" if as_written.refused else "fits"
    if recommended is None:
        mend = "more memory, more workers, shorter rows, gradient_checkpointing or zero.offload_optimizer"
        return f"{own} {verdict}; nothing fits {gpu}: choose {mend}"
    fits = f"zero.stage={recommended.zero_stage} micro_batch={recommended.micro_batch}"
    return f"{own} {verdict}; fits best: {fits}, {_size(recommended.memory.total)} a worker"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:,.1f} minutes" if hours >= 1 / 60 else f"{hours * 3600:,.1f} seconds"
