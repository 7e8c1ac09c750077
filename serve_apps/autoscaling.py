"""Replicas follow work, each modality by itself: images, seconds of audio, or tokens and the memory that they take.

In: what replicas report of themselves and what the callers' handles report to Serve. Out: how many replicas there
should be. Serve adds the delays. What a replica holds is known exactly (`serve_apps.work_in_flight`). Of a request that
waits at a caller Serve tells only that it is there, so it counts as much as recent requests did; it waits there only
once every replica holds all the requests that it takes, so the estimate matters only when more replicas are due anyway.

Serve's controller runs this module and need not have mmllm installed: Serve sends it the module by value, so only
Python's own library is imported here, and Ray by the policy alone. `cluster.capacity` asks `decide` about replicas
that are simulated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_ROUNDING = 1e-6  # means over a window come with rounding errors, which should not cost a replica


@dataclass(frozen=True)
class Targets:
    """What one replica should hold at a time. Work is in the modality's unit."""

    work: float
    per_request: float
    """Work of a request before any was measured."""
    requests: int
    """Requests that a replica takes; those above it wait at the callers."""
    kv_use: float | None = None
    """Share of the memory for keys and values, for replicas that have such memory."""
    tolerance: float = 0.0
    """Share of the targets that must be left free when there are fewer replicas."""


@dataclass(frozen=True)
class Report:
    """What one replica said of itself, each a mean over the look-back."""

    work: float
    requests: float
    unweighed: float
    """Of `requests`, those whose work is not known yet and not in `work`."""
    per_request: float | None = None
    """Work of its recent requests."""
    kv_use: float = 0.0
    alike: int = 1
    """Replicas that it stands for: all of them said this."""


@dataclass(frozen=True)
class Observed:
    """What is known of a deployment at one time."""

    running: int
    """Replicas that run."""
    wanted: int
    """Replicas that were decided on before."""
    queued: float
    """Requests that wait at callers."""
    ongoing: float
    """Requests that callers have sent or hold back; `queued` is part of them."""
    reports: tuple[Report, ...]
    min_replicas: int
    max_replicas: int
    remembered: float | None = None
    """Work per request when it was last known."""


@dataclass(frozen=True)
class Decision:
    """How many replicas there should be, and what for."""

    replicas: int
    work: float
    requests: float
    per_request: float | None
    kv_use: float
    """Mean over the replicas that reported."""


def decide(seen: Observed, targets: Targets) -> Decision:
    """Choose the number of replicas.

    As many as hold the work at `targets.work` each, all requests within what a replica takes, and keys and values
    within `targets.kv_use`; whichever asks for most. Fewer than before only if `targets.tolerance` stays free, and only
    once every running replica has reported: one that has not may hold work.
    """
    n_reported = sum(report.alike for report in seen.reports)
    silent = seen.running > n_reported
    reported = sum(report.requests * report.alike for report in seen.reports)
    # Handles also count what they have sent, but that count is older than a report, and one that misses the end of a
    # stream would hold replicas for ever. It is asked for only where a replica says nothing itself.
    unseen = max(seen.queued, seen.ongoing - reported) if silent else seen.queued
    per_request = _mean_per_request(seen.reports, seen.remembered)
    unweighed = unseen + sum(report.unweighed * report.alike for report in seen.reports)
    work = sum(report.work * report.alike for report in seen.reports) + unweighed * (per_request or targets.per_request)
    requests = reported + unseen
    kv_use = sum(report.kv_use * report.alike for report in seen.reports)
    needs = [work / targets.work, requests / targets.requests]
    if targets.kv_use is not None:
        needs.append(kv_use / targets.kv_use)
    replicas = _stepped(max(needs), seen.wanted, targets.tolerance)
    if silent:
        replicas = max(replicas, seen.wanted)
    bounded = min(max(replicas, seen.min_replicas), seen.max_replicas)
    return Decision(bounded, work, requests, per_request, kv_use / max(1, n_reported))


def _mean_per_request(reports: tuple[Report, ...], remembered: float | None) -> float | None:
    """Work of a request, over the replicas that know it."""
    known = [(report.per_request, report.alike) for report in reports if report.per_request is not None]
    if not known:
        return remembered
    return sum(work * alike for work, alike in known) / sum(alike for _, alike in known)


def _stepped(need: float, wanted: int, tolerance: float) -> int:
    """Replicas for `need` replicas' worth of work, slower to let go than to add."""
    more = _ceil(need)
    return more if more >= wanted else min(wanted, _ceil(need / (1 - tolerance)))


def _ceil(need: float) -> int:
    return max(math.ceil(need - _ROUNDING), 1 if need > 0 else 0)


def reports_of(metrics: Mapping[str, Mapping[Any, float]] | None, replicas: Sequence[Any]) -> tuple[Report, ...]:
    """Reports of the running replicas that have given one whole.

    Args:
        metrics: name -> replica -> mean, as Serve aggregates what `record_autoscaling_stats` returned.
        replicas: ids of those that run; what others said last is left out.
    """
    found = []
    for replica in replicas:
        said = {name: of[replica] for name, of in (metrics or {}).items() if replica in of}
        if not {"work", "requests", "unweighed"} <= said.keys() or not all(map(math.isfinite, said.values())):
            continue
        found.append(
            Report(
                said["work"],
                said["requests"],
                said["unweighed"],
                said.get("work_per_request"),
                said.get("kv_use", 0.0),
            )
        )
    return tuple(found)


class WorkPolicy:
    """`decide` as Serve's controller calls it, ten times a second; shows what it sees as Ray metrics.

    Args:
        modality, unit: labels of the metrics.
        targets: fields of `Targets`.
    """

    def __init__(self, modality: str, unit: str, targets: dict[str, Any]):
        from ray.util.metrics import Gauge

        self._targets = Targets(**targets)
        self._labels = {"modality": modality, "unit": unit}
        self._gauges = {
            name: Gauge(f"mmllm_autoscaling_{name}", description, ("application", "modality", "unit"))
            for name, description in {
                "replicas": "Replicas that run.",
                "replicas_wanted": "Replicas that the work asks for, before delays.",
                "work": "Work that waits or is in flight, in the unit that is named; a mean over the look-back.",
                "requests": "Requests that wait or are in flight; a mean over the look-back.",
                "kv_use": "Share of the memory for keys and values in use; a mean over replicas.",
            }.items()
        }

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """The replicas that there should be, and what to remember until the next call."""
        seen = Observed(
            running=context.current_num_replicas,
            wanted=context.target_num_replicas,
            queued=context.total_queued_requests,
            ongoing=context.total_num_requests,
            reports=reports_of(context.aggregated_metrics, context.running_replicas),
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
            remembered=context.policy_state.get("work_per_request"),
        )
        decision = decide(seen, self._targets)
        shown = {
            "replicas": seen.running,
            "replicas_wanted": decision.replicas,
            "work": decision.work,
            "requests": decision.requests,
            "kv_use": decision.kv_use,
        }
        for name, value in shown.items():
            self._gauges[name].set(value, self._labels | {"application": context.app_name or ""})
        return decision.replicas, {"work_per_request": decision.per_request}
