"""Every metric of the service, by name: what it counts, its labels and its buckets.

In: a name. Out: a Ray metric, which every node exports at its own port (as `ray_mmllm_...`, counters with `_total`) and
`serve_apps.metrics_page` gathers for `/metrics`; in a process of no Ray cluster, a metric that keeps nothing. Does not
know who counts what. The autoscaler, which runs where mmllm is not installed, has metrics of its own:
`serve_apps.autoscaling`. Of histograms Ray keeps the buckets alone and makes their sums of the buckets' middles, so
means are taken from counters.
"""

import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from serve_apps.ray_process import is_connected

if TYPE_CHECKING:
    from ray.serve.metrics import Counter, Gauge, Histogram

_REFRESH_S = 1.0
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True)
class MetricSpec:
    """What a metric is."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    buckets: Sequence[float] = ()

    def exported(self, name: str) -> str:
        """The name under which Prometheus sees it; a histogram's has `_bucket`, `_sum` or `_count` behind it."""
        return f"ray_{name}_total" if self.kind == "counter" else f"ray_{name}"


METRICS: dict[str, MetricSpec] = {
    # the ingress
    "mmllm_requests": MetricSpec("counter", "Requests that ended.", ("path", "method", "status")),
    "mmllm_requests_cancelled": MetricSpec("counter", "Requests whose caller left before the end.", ("path",)),
    "mmllm_requests_open": MetricSpec("gauge", "Requests that the ingress holds."),
    "mmllm_request_seconds": MetricSpec("histogram", "From a request to its end.", ("path",), _SECONDS),
    "mmllm_ttft_seconds": MetricSpec("histogram", "From a request to its first token.", ("modalities",), _SECONDS),
    "mmllm_inter_token_seconds": MetricSpec("histogram", "Between tokens of an answer.", (), _TOKEN_SECONDS),
    "mmllm_prompt_tokens": MetricSpec("counter", "Tokens of prompts, images' positions too."),
    "mmllm_cached_tokens": MetricSpec("counter", "Those of them that were not computed anew."),
    "mmllm_completion_tokens": MetricSpec("counter", "Tokens of answers."),
    # each modality, and the ingress
    "mmllm_replicas": MetricSpec("gauge", "Replicas: each shows one.", ("modality",)),
    "mmllm_work_in_flight": MetricSpec(
        "gauge", "Work that a replica holds, waiting or running, in the unit that is named.", ("modality", "unit")
    ),
    "mmllm_waiting": MetricSpec(
        "gauge", "Requests that wait at a replica: of text until their first token.", ("modality",)
    ),
    "mmllm_running": MetricSpec("gauge", "Requests that a replica works on.", ("modality",)),
    # CLIP
    "mmllm_images": MetricSpec("counter", "Images seen, by where their features came from.", ("tier",)),
    "mmllm_clip_batch_images": MetricSpec("histogram", "Images of a batch.", (), (1, 2, 4, 8, 16, 32, 64, 128)),
    # Whisper
    "mmllm_audio_seconds": MetricSpec("counter", "Seconds of sound that were transcribed."),
    "mmllm_audio_compute_seconds": MetricSpec("counter", "Seconds that transcribing them took."),
    "mmllm_audio_real_time_factor": MetricSpec(
        "histogram", "Seconds that a second of sound took.", (), (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)
    ),
    # the LM
    "mmllm_kv_use": MetricSpec("gauge", "Share of the memory for keys and values that is in use."),
}


def counter(name: str) -> "Counter | Unkept":
    """A counter of `METRICS`."""
    if not is_connected():
        return Unkept()
    from ray.serve.metrics import Counter

    spec = METRICS[name]
    return Counter(name, spec.description, spec.labels)


def gauge(name: str, **labels: str) -> "KeptGauge | Unkept":
    """A gauge of `METRICS`, all of whose labels are given."""
    if not is_connected():
        return Unkept()
    from ray.serve.metrics import Gauge

    spec = METRICS[name]
    ray_gauge = Gauge(name, spec.description, spec.labels)
    ray_gauge.set_default_tags(labels)
    return KeptGauge(ray_gauge)


def histogram(name: str) -> "Histogram | Unkept":
    """A histogram of `METRICS`."""
    if not is_connected():
        return Unkept()
    from ray.serve.metrics import Histogram

    spec = METRICS[name]
    return Histogram(name, spec.description, list(spec.buckets), spec.labels)


class Unkept:
    """A metric in a process of no Ray cluster, where nobody would gather it."""

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        """Count nothing."""

    def set(self, value: float) -> None:
        """Show nothing."""

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Observe nothing."""


class KeptGauge:
    """A gauge that shows its last value for as long as it lives: Ray forgets what is not set again and again.

    So what a replica showed is gone soon after it.
    """

    def __init__(self, ray_gauge: "Gauge"):
        self._gauge = ray_gauge
        self._value: float | None = None
        with _refreshing:
            _gauges.add(self)
            if not _refresher.is_alive():
                _refresher.start()

    def set(self, value: float) -> None:
        """Show a value from now on."""
        self._value = value
        self._gauge.set(value)

    def refresh(self) -> None:
        """Show the last value again."""
        self._gauge.set(self._value)


def _refresh() -> None:
    while True:
        time.sleep(_REFRESH_S)
        with _refreshing:
            kept = list(_gauges)
        for shown in kept:
            shown.refresh()
        del kept


_gauges: "weakref.WeakSet[KeptGauge]" = weakref.WeakSet()
_refreshing = threading.Lock()
_refresher = threading.Thread(target=_refresh, name="refresh-gauges", daemon=True)
