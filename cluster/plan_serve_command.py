"""`mmllm plan serve`: options in, a table out; what is simulated is `cluster.capacity`'s."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmllm_core.errors import ConfigError

if TYPE_CHECKING:
    from cluster.capacity.answer import Answer

console = Console() if sys.stdout.isatty() else Console(width=1_000)  # a pipe wants a line a row


def plan_serve(
    rps: Annotated[float, typer.Option(help="Requests a second, at the peak.", min=0.001, max=100_000)],
    mix: Annotated[
        str, typer.Option(help="Shares of text, image and audio requests.")
    ] = "text=0.6,image=0.3,audio=0.1",
    slo: Annotated[str | None, typer.Option(help="Promise to keep for 95% of requests, such as ttft=2 (s).")] = None,
    trace: Annotated[str, typer.Option(help="steady, daily, burst or shift (images and sound swap shares).")] = "daily",
    hours: Annotated[float | None, typer.Option(help="How long the trace is.", min=0.01, max=24 * 31)] = None,
    profile: Annotated[str, typer.Option(help="embedded, phi, or a serve config's YAML file.")] = "embedded",
    times: Annotated[
        str, typer.Option(help="Service times: embedded-cpu, or a YAML file of your own hardware.")
    ] = "embedded-cpu",
    prompt_tokens: Annotated[int, typer.Option(help="Typed, of a request.", min=1)] = 200,
    answer_tokens: Annotated[int, typer.Option(help="Of an answer, on average.", min=1)] = 150,
    images: Annotated[int, typer.Option(help="Of a request with images.", min=1)] = 1,
    audio_seconds: Annotated[float, typer.Option(help="Of a request with sound.", min=0.1)] = 6.0,
    cpu_price: Annotated[float | None, typer.Option(help="Dollars that you pay for a CPU core an hour.", min=0)] = None,
    gpu_price: Annotated[float | None, typer.Option(help="Dollars that you pay for a GPU an hour.", min=0)] = None,
    max_replicas: Annotated[int, typer.Option(help="Of a deployment, instead of the config's own.", min=1)] = 2_000,
    plot: Annotated[Path | None, typer.Option(help="Draw load, replicas and cost into a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what serving a load takes, by simulation: replicas, GPUs, cost, first token's p95, what scaling saves."""
    from cluster.capacity.answer import Prices, Question, answer
    from cluster.capacity.service_times import load_service_times
    from cluster.capacity.simulation import Shape
    from cluster.capacity.traces import parse_mix, trace_of
    from serve_apps.builder import load_serve_config

    question = Question(
        load_serve_config(profile),
        load_service_times(times),
        trace_of(trace, rps, parse_mix(mix), hours and hours * 3600),
        Shape(prompt_tokens, answer_tokens, images, audio_seconds),
        Prices(cpu_price, gpu_price),
        parse_slo(slo) if slo else None,
        max_replicas,
    )
    parts, whole = answer(question), answer(question, whole=True)
    if plot:
        from cluster.capacity.plot import plot as draw

        draw(parts, whole, plot)
    if as_json:
        print(json.dumps(values(parts, whole)))
    else:
        _print(parts, whole)


def parse_slo(said: str) -> float:
    """Seconds of `ttft=2`, `ttft=2s` or `ttft=800ms`.

    Raises:
        ConfigError: it is none of these.
    """
    name, _, value = said.partition("=")
    number, scale = (value[:-2], 1e-3) if value.endswith("ms") else (value.removesuffix("s"), 1.0)
    try:
        if name.strip() != "ttft" or not 0 < (seconds := float(number) * scale) < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--slo {said}: write ttft=2 or ttft=800ms, seconds to the first token") from None
    return seconds


def values(parts: "Answer", whole: "Answer") -> dict[str, Any]:
    """Both answers as JSON-serialisable values; seconds, hours and dollars."""
    from cluster.capacity.answer import saving

    question = parts.question
    share, unit = saving(parts, whole)
    return {
        "trace": question.trace.name,
        "peak_rps": question.trace.peak_rps,
        "seconds": question.trace.seconds,
        "times": {"origin": question.times.origin, "where": question.times.where},
        "slo_ttft_s": question.ttft_s,
        "per_modality": _values(parts),
        "whole": _values(whole),
        "saving": {"share": share, "of": unit},
    }


def _values(found: "Answer") -> dict[str, Any]:
    from cluster.capacity.traces import KINDS

    outcome = found.outcome
    return {
        "replicas": {
            name: {"mean": float(counts.mean()), "peak": float(counts.max())}
            for name, counts in outcome.replicas.items()
        },
        "peak": found.peak.model_dump(),
        "hours": found.hours.model_dump(),
        "dollars_per_hour": found.dollars_per_hour,
        "ttft_s": {"p50": outcome.ttft(0.5), "p95": outcome.ttft(0.95)},
        "ttft_s_p95_by_kind": {kind: outcome.ttft(0.95, kind) for kind in KINDS},
        "requests": outcome.arrived,
        "refused": outcome.refused,
        "target_share": found.target_share,
        "slo_kept": found.keeps,
    }


def _print(parts: "Answer", whole: "Answer") -> None:
    from cluster.capacity.answer import saving

    question = parts.question
    trace, mix = question.trace, question.trace.mix
    console.print(
        f"{trace.name}, up to {trace.peak_rps:,g} requests/s ({mix.text:.0%} text, {mix.image:.0%} image, "
        f"{mix.audio:.0%} audio), {trace.seconds / 3600:,.3g} hours; {parts.outcome.arrived:,} requests",
        highlight=False,
    )
    table = Table("", "each modality by itself", "one deployment scaled whole", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in parts.outcome.replicas:
        table.add_row(f"{name} replicas, mean (peak)", *(_count(found, name) for found in (parts, whole)))
    for label, told in (
        ("CPUs at the peak", lambda found: f"{found.peak.cpus:,.0f}"),
        ("GPUs at the peak", lambda found: f"{found.peak.gpus:,.1f}"),
        ("CPU hours", lambda found: f"{found.hours.cpus:,.0f}"),
        ("GPU hours", lambda found: f"{found.hours.gpus:,.1f}"),
        ("dollars an hour", lambda found: _dollars(found.dollars_per_hour)),
        ("first token, p50", lambda found: _seconds(found.outcome.ttft(0.5))),
        ("first token, p95", lambda found: _seconds(found.outcome.ttft(0.95))),
        ("refused (429)", lambda found: f"{found.outcome.refused / max(1, found.outcome.arrived):.2%}"),
        ("of the config's targets", lambda found: f"{found.target_share:.0%}"),
    ):
        table.add_row(label, told(parts), told(whole))
    console.print(table, highlight=False)
    if question.ttft_s is not None:
        for found, label in ((parts, "each by itself"), (whole, "scaled whole")):
            verdict = "is kept" if found.keeps else "is NOT kept"
            console.print(f"{label}: p95 within {question.ttft_s:g} s {verdict}", highlight=False)
    share, unit = saving(parts, whole)
    console.print(f"scaling each modality by itself saves [bold]{share:.0%}[/bold] of {unit}", highlight=False)
    console.print(escape(f"service times {question.times.origin}: {question.times.where}"), highlight=False)


def _count(found: "Answer", name: str) -> str:
    counts = found.outcome.replicas[name]
    return f"{counts.mean():,.1f} ({counts.max():,.0f})"


def _dollars(value: float | None) -> str:
    return "price not given" if value is None else f"${value:,.2f}"


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} s"
