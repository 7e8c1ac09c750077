"""Headline figures of runs: what they reached, at what speed, in how much memory.

In: `RunRecord`s. Out: names and texts. What no run measured has no figure. Does not know pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mmllm_core.evaluation.accuracy import Score
from train_jobs.run_record import RunRecord


@dataclass(frozen=True)
class Figure:
    """A headline figure: its name, and a value for each run (None where it was not measured)."""

    name: str
    values: tuple[str | None, ...]
    intervals: tuple[str, ...]
    """Of the values, where they have some."""


def figures(records: Sequence[RunRecord]) -> list[Figure]:
    """The figures that at least one run has."""

    def steps(run: RunRecord) -> str | None:
        return f"{run.steps[-1]['step']:,}" if run.steps else None

    def loss(run: RunRecord) -> str | None:
        last = run.steps[-1] if run.steps else {}
        value = last.get("loss_ema", last.get("loss"))
        return None if value is None else f"{value:.3f}"

    def memory(run: RunRecord) -> str | None:
        _, values = run.series("memory_gb")
        return f"{max(values):.2f} GB" if values else None

    def restarts(run: RunRecord) -> str | None:
        return str(sum(event["event"] == "resumed" for event in run.events)) if run.steps else None

    rows = {
        "accuracy after": lambda run: _percent(run.overall("after")),
        "accuracy before": lambda run: _percent(run.overall("before")),
        "last loss, smoothed": loss,
        "steps": steps,
        "tokens": lambda run: _count(run.total("tokens")),
        "tokens a second": lambda run: _count(run.typical("tokens_per_second")),
        "conversations a second": lambda run: number(run.typical("samples_per_second")),
        "MFU": lambda run: None if (mfu := run.typical("mfu")) is None else f"{mfu:.1%}",
        "peak memory": memory,
        "time in steps": lambda run: _duration(run.total("step_seconds")),
        "restarts": restarts,
    }
    intervals = {
        f"accuracy {when}": tuple(_interval(run.overall(when)) for run in records) for when in ("after", "before")
    }
    found = [
        Figure(name, tuple(value(run) for run in records), intervals.get(name, ("",) * len(records)))
        for name, value in rows.items()
    ]
    return [figure for figure in found if any(value is not None for value in figure.values)]


def _percent(score: Score | None) -> str | None:
    return None if score is None else f"{score.accuracy:.1%}"


def _interval(score: Score | None) -> str:
    """95% interval in percent, such as `85.3-92.3`."""
    return "" if score is None else "{:.1f}-{:.1f}".format(*(100 * bound for bound in score.interval))


def number(value: float | None) -> str | None:
    """Three digits; None stays None."""
    return None if value is None else f"{value:.3g}"


def _count(value: float | None) -> str | None:
    if value is None:
        return None
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
