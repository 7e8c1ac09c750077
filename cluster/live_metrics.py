"""What `/metrics` of a running service says now: rates and quantiles between two looks at it.

In: the exposition text, taken twice. Out: a `Frame`, what happened between. Does not know how it is shown.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mmllm_core.errors import EnvironmentLack, MmllmError

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Look:
    """All samples at one time, in seconds of any clock; labels that only tell replicas apart are summed over."""

    at: float
    samples: Mapping[str, Mapping[Labels, float]]

    def total(self, name: str, **labels: str) -> float:
        """A metric's sum over all samples that have `labels`; 0 where there are none."""
        wanted = set(labels.items())
        return sum(value for found, value in self.samples.get(name, {}).items() if wanted <= set(found))


@dataclass(frozen=True)
class ModalityNow:
    """One modality. `rate` is in its own unit a second: tokens of answers, images, seconds of sound."""

    replicas: int
    waiting: int
    running: int
    rate: float
    cached: float | None
    """Share that was not computed anew, where there was anything."""


@dataclass(frozen=True)
class Frame:
    """What happened between two looks; times in seconds, None where nothing did."""

    requests: float
    """A second."""
    failed: float
    """Answered with 4xx or 5xx, a second."""
    open: int
    ttft: tuple[float | None, float | None]
    """Median, and 95th percentile."""
    between_tokens: tuple[float | None, float | None]
    real_time_factor: float | None
    kv_use: float
    modalities: dict[str, ModalityNow] = field(default_factory=dict)


def take_look(base_url: str, api_key: str, at: float) -> Look:
    """Ask a service.

    Raises:
        EnvironmentLack: nobody answers there.
        MmllmError: it refuses; the message is its own.
    """
    import httpx

    try:
        reply = httpx.get(f"{base_url}/metrics", headers={"authorization": f"Bearer {api_key}"}, timeout=30)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EnvironmentLack(f"{base_url}: nobody answers: start the assistant with 'make serve'") from error
    if not reply.is_success:
        raise MmllmError(f"{base_url}/metrics answers {reply.status_code}: give a key with --api-key, if it wants one")
    return Look(at, parse(reply.text))


def parse(page: str) -> dict[str, dict[Labels, float]]:
    """Samples of our metrics by name and labels, summed over replicas."""
    from prometheus_client.parser import text_string_to_metric_families

    apart = {"replica", "deployment", "application", "WorkerId", "NodeAddress", "Component", "SessionName", "Version"}
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name not in apart))
            named = samples.setdefault(sample.name, {})
            named[labels] = named.get(labels, 0.0) + sample.value
    return samples


def frame(before: Look, now: Look) -> Frame:
    """What happened between two looks; counters that fell, as those of a new replica do, count from zero."""
    seconds = max(now.at - before.at, 1e-9)

    def added(name: str, **labels: str) -> float:
        was, is_now = before.total(name, **labels), now.total(name, **labels)
        return is_now - was if is_now >= was else is_now

    statuses = {dict(labels).get("status", "") for labels in now.samples.get("ray_mmllm_requests_total", {})}
    failed = sum(added("ray_mmllm_requests_total", status=status) for status in statuses if status >= "400")
    prompt, images = added("ray_mmllm_prompt_tokens_total"), added("ray_mmllm_images_total")
    sound = added("ray_mmllm_audio_seconds_total")
    rates = {"text": added("ray_mmllm_completion_tokens_total"), "vision": images, "audio": sound}
    cached = {
        "text": added("ray_mmllm_cached_tokens_total") / prompt if prompt else None,
        "vision": 1 - added("ray_mmllm_images_total", tier="computed") / images if images else None,
    }
    return Frame(
        requests=added("ray_mmllm_requests_total") / seconds,
        failed=failed / seconds,
        open=round(now.total("ray_mmllm_requests_open")),
        ttft=_quantiles("ray_mmllm_ttft_seconds_bucket", before, now),
        between_tokens=_quantiles("ray_mmllm_inter_token_seconds_bucket", before, now),
        real_time_factor=added("ray_mmllm_audio_compute_seconds_total") / sound if sound else None,
        kv_use=now.total("ray_mmllm_kv_use") / max(1.0, now.total("ray_mmllm_replicas", modality="text")),
        modalities={
            modality: ModalityNow(
                round(now.total("ray_mmllm_replicas", modality=modality)),
                round(now.total("ray_mmllm_waiting", modality=modality)),
                round(now.total("ray_mmllm_running", modality=modality)),
                rates[modality] / seconds,
                cached.get(modality),
            )
            for modality in rates
        },
    )


def _quantiles(name: str, before: Look, now: Look) -> tuple[float | None, float | None]:
    bounds = sorted({float(dict(labels)["le"]) for labels in now.samples.get(name, {})})
    counts = [_below(now, name, bound) - _below(before, name, bound) for bound in bounds]
    if counts and min(counts) < 0:  # a new replica counts anew
        counts = [_below(now, name, bound) for bound in bounds]
    return quantile(0.5, bounds, counts), quantile(0.95, bounds, counts)


def _below(look: Look, name: str, bound: float) -> float:
    return sum(value for labels, value in look.samples.get(name, {}).items() if float(dict(labels)["le"]) == bound)


def quantile(share: float, bounds: list[float], counts: list[float]) -> float | None:
    """The value below which `share` of a histogram lies, straight between bounds, as Prometheus reckons it.

    Args:
        bounds: of its buckets, rising; the last may be infinite, for which the one before stands.
        counts: at or below each bound.
    """
    if not counts or counts[-1] <= 0:
        return None
    wanted, low, below = share * counts[-1], 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=True):
        if count >= wanted:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (wanted - below) / max(count - below, 1e-12)
        low, below = bound, count
    return low
