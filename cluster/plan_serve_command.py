"""`mmllm plan serve`: options in, an answer out; what is simulated is `cluster.capacity`'s, how it looks `.shown`'s."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mmllm_core.errors import ConfigError


def plan_serve(
    rps: Annotated[float, typer.Option(help="Requests a second, at the peak.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of the profile to change, as key=value.")
    ] = None,
    mix: Annotated[
        str, typer.Option(help="Shares of text, image and audio requests; they add up to 1.")
    ] = "text=0.6,image=0.3,audio=0.1",
    slo: Annotated[str | None, typer.Option(help="Promise to keep for 95% of requests, such as ttft=2 (s).")] = None,
    trace: Annotated[str, typer.Option(help="steady, daily, burst or shift (images and sound swap shares).")] = "daily",
    hours: Annotated[float | None, typer.Option(help="How long the trace is.", min=0.01, max=72)] = None,
    profile: Annotated[str, typer.Option(help="embedded, phi, or a serve config's YAML file.")] = "embedded",
    times: Annotated[
        str, typer.Option(help="Service times: embedded-cpu, or a YAML file of your own hardware.")
    ] = "embedded-cpu",
    prompt_tokens: Annotated[int, typer.Option(help="Typed, of a request.", min=1)] = 200,
    answer_tokens: Annotated[int, typer.Option(help="Of an answer, on average.", min=1)] = 150,
    images: Annotated[int, typer.Option(help="Of a request with images.", min=1)] = 1,
    audio_seconds: Annotated[float, typer.Option(help="Of a request with sound.", min=0.1)] = 6.0,
    prices: Annotated[Path | None, typer.Option(help="A table of prices (YAML) instead of the packaged one.")] = None,
    cpu_price: Annotated[float | None, typer.Option(help="Dollars that you pay for a CPU core an hour.", min=0)] = None,
    gpu_price: Annotated[float | None, typer.Option(help="Dollars that you pay for a GPU an hour.", min=0)] = None,
    max_replicas: Annotated[int, typer.Option(help="Of a deployment, instead of the config's own.", min=1)] = 2_000,
    plot: Annotated[Path | None, typer.Option(help="Draw load, replicas and cost into a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what serving a load takes, by simulation: replicas, GPUs, cost, first token's p95, what scaling saves."""
    from cluster.capacity.answer import Question
    from cluster.capacity.answers import answers
    from cluster.capacity.prices import Prices, load_prices
    from cluster.capacity.service_times import load_service_times
    from cluster.capacity.shown import complaint, print_answers, values
    from cluster.capacity.simulation import Shape
    from cluster.capacity.traces import parse_mix, trace_of
    from mmllm_core.config import parse_overrides
    from serve_apps.config_files import load_serve_config

    if not 0 < rps <= 1_000_000:
        raise ConfigError(
            f"--rps {rps:g}: say how many requests come in a second at the peak, above 0, such as 0.5 or 200"
        )
    if plot and not plot.absolute().parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no folder {plot.absolute().parent}")
    question = Question(
        load_serve_config(profile, _roomy(parse_overrides(overrides or []), max_replicas)),
        load_service_times(times),
        trace_of(trace, rps, parse_mix(mix), hours and hours * 3600),
        Shape(prompt_tokens, answer_tokens, images, audio_seconds),
        Prices(load_prices(prices), cpu_price, gpu_price),
        parse_slo(slo) if slo is not None else None,
        max_replicas,
    )
    with _bar(f"simulating {question.trace.seconds / 3600:.3g} hours, three ways to scale") as tell:
        parts, whole, packed = answers(question, tell)
    if plot:
        from cluster.capacity.plot import plot as draw

        draw(parts, whole, packed, plot)
    if as_json:
        print(json.dumps(values(parts, whole, packed)))
    else:
        print_answers(parts, whole, packed)
    if wrong := complaint(parts):
        raise ConfigError(wrong)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[float], object]]:
    """A bar for who looks at a terminal; what is printed may be piped meanwhile."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("  {task.description}"), BarColumn(bar_width=30), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def _roomy(overrides: dict[str, Any], max_replicas: int) -> dict[str, Any]:
    """Overrides by which the bound on replicas that a profile has, which is not asked, refuses no `min_replicas`."""
    floors = [key for key in overrides if key.endswith(".autoscaling.min_replicas")]
    return {key.replace("min_replicas", "max_replicas"): max_replicas for key in floors} | overrides


def parse_slo(said: str) -> float:
    """Seconds of `ttft=2`, `ttft=2s` or `ttft=800ms`.

    Raises:
        ConfigError: it is none of these.
    """
    name, _, value = said.partition("=")
    number, scale = (value[:-2], 1e-3) if value.endswith("ms") else (value.removesuffix("s"), 1.0)
    try:
        if name.strip() != "ttft" or not 0 < (seconds := float(number) * scale) < math.inf:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--slo {said}: write ttft=2 or ttft=800ms, seconds to the first token") from None
    return seconds
