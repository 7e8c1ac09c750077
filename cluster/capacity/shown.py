"""Answers as JSON-serialisable values, as a table, and what is wrong with them. Does not know how they came about."""

import math
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.capacity.answer import PROMISED, Answer, saving
from cluster.capacity.prices import CPU
from cluster.capacity.traces import KINDS

COLUMNS = {
    "apart": "each modality by itself",
    "whole": "whole, each model its own share",
    "packed": "whole, models take turns",
}


def values(parts: Answer, whole: Answer, packed: Answer) -> dict[str, Any]:
    """All three answers; seconds, hours and dollars."""
    question = parts.question
    return {
        "trace": question.trace.name,
        "peak_rps": question.trace.peak_rps,
        "seconds": question.trace.seconds,
        "times": {"origin": question.times.origin, "where": question.times.where, "versions": question.times.versions},
        "prices": {name: question.prices.explained(name) for name in parts.hours},
        "slo_ttft_s": question.ttft_s,
        "per_modality": _values(parts),
        "whole": _values(whole),
        "packed": _values(packed),
        "saving": {
            f"of_{one.way}": dict(zip(("share", "unit"), saving(parts, one), strict=True)) for one in (whole, packed)
        },
    }


def print_answers(parts: Answer, whole: Answer, packed: Answer) -> None:
    """A table of all three, what is saved, and what it goes by."""
    question = parts.question
    trace, mix, answers = question.trace, question.trace.mix, (parts, whole, packed)
    console = Console() if sys.stdout.isatty() else Console(width=1_000)  # a pipe wants a line a row
    console.print(
        f"{trace.name}, up to {trace.peak_rps:,g} requests/s ({mix.text:.0%} text, {mix.image:.0%} image, "
        f"{mix.audio:.0%} audio), {trace.seconds / 3600:,.3g} hours; {parts.outcome.arrived:,} requests",
        highlight=False,
    )
    table = Table("", *(COLUMNS[one.way] for one in answers), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in parts.outcome.replicas:
        table.add_row(f"{name} replicas, mean (peak)", *(_count(one, name) for one in answers))
    for name in dict.fromkeys(name for one in answers for name in one.hours):
        kind = "CPUs" if name == CPU else f"{name}s" if name == "GPU" else f"{name} GPUs"
        table.add_row(f"{kind} at the peak", *(f"{math.ceil(one.peak.get(name, 0) - 1e-9):,}" for one in answers))
        table.add_row(f"{kind}, mean", *(f"{one.hours.get(name, 0) / trace.seconds * 3600:,.1f}" for one in answers))
    rows: tuple[tuple[str, Callable[[Answer], str]], ...] = (
        ("dollars an hour, mean", lambda one: _dollars(one.dollars_per_hour)),
        ("first token, p50", lambda one: _seconds(one.outcome.ttft(0.5))),
        ("first token, p95", lambda one: _seconds(one.outcome.ttft(PROMISED))),
        ("refused (429)", lambda one: f"{one.outcome.refused / max(1, one.outcome.arrived):.2%}"),
        ("of the config's targets", lambda one: _shares(one.target_shares)),
    )
    for label, told in rows:
        table.add_row(label, *(told(one) for one in answers))
    if question.ttft_s is not None:
        label = f"{PROMISED:.0%} within {question.ttft_s:g} s"
        table.add_row(label, *("kept" if one.keeps else "NOT kept" for one in answers))
    console.print(table, highlight=False)
    for one in (whole, packed):
        console.print(_saved(parts, one), highlight=False)
    console.print(escape(f"service times {question.times.origin}: {question.times.where}"), highlight=False)
    for name in parts.hours:
        console.print(escape(question.prices.explained(name)), highlight=False, soft_wrap=True)


def complaint(found: Answer) -> str | None:
    """What is wrong with an answer and what to do about it; None if nothing is."""
    refused = found.outcome.refused / max(1, found.outcome.arrived)
    if found.keeps is False:
        wrong = f"--slo ttft={found.question.ttft_s:g} is not kept: p95 is {found.outcome.ttft(PROMISED) or 0:.2f} s"
        wrong += f", and {refused:.1%} are refused" if refused > 1e-4 else ""
    elif refused > 0.01:
        wrong = f"{refused:.1%} of requests are refused (429)"
    else:
        return None
    if found.capped:
        return f"{wrong}. {' and '.join(found.capped)} reached --max-replicas {found.question.max_replicas}: raise it"
    if not found.question.scaled:
        return f"{wrong}. This config has a fixed number of replicas: raise num_replicas, or give it autoscaling"
    return (
        f"{wrong}. Replicas come after the load does: keep more of them (phi.autoscaling.min_replicas=4), let them "
        "come sooner (phi.autoscaling.upscale_delay_s=5), or promise more seconds"
    )


def _values(one: Answer) -> dict[str, Any]:
    outcome = one.outcome
    return {
        "replicas": {
            name: {"mean": float(counts.mean()), "peak": float(counts.max())}
            for name, counts in outcome.replicas.items()
        },
        "peak": one.peak,
        "gpus": math.ceil(sum(amount for name, amount in one.peak.items() if name != CPU) - 1e-9),
        "hours": one.hours,
        "dollars_per_hour": one.dollars_per_hour,
        "ttft_s": {"p50": outcome.ttft(0.5), "p95": outcome.ttft(PROMISED)},
        "ttft_s_p95_by_kind": {kind: outcome.ttft(PROMISED, kind) for kind in KINDS},
        "requests": outcome.arrived,
        "refused": outcome.refused,
        "target_shares": one.target_shares,
        "slo_kept": one.keeps,
    }


def _saved(parts: Answer, other: Answer) -> str:
    share, unit = saving(parts, other)
    against = (
        "one deployment scaled whole, "
        + {"whole": "each model with its own share", "packed": "models in turns"}[other.way]
    )
    what = f"saves [bold]{share:.0%}[/bold] of {unit}" if share >= 0 else f"costs [bold]{-share:.0%}[/bold] more {unit}"
    broken = "" if other.keeps is not False else ", which does not keep the promise"
    return f"scaling each modality by itself {what} against {against}{broken}"


def _count(one: Answer, name: str) -> str:
    counts = one.outcome.replicas[name]
    return f"{counts.mean():,.1f} ({counts.max():,.0f})"


def _shares(shares: dict[str, float]) -> str:
    different = set(shares.values())
    if len(different) == 1:
        return f"{different.pop():.0%}"
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _dollars(value: float | None) -> str:
    return "no price" if value is None else f"${value:,.2f}"


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} s"
