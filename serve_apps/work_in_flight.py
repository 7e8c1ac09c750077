"""How much a replica has to do, in its modality's unit: images, seconds of audio, or tokens.

Counts from when a request reaches the replica until it leaves, so what waits inside counts too. Does not know what the
work is, nor how many replicas it needs: `serve_apps.autoscaling` decides that from what `WorkInFlight.stats` says.
Every request is a line in the replica's log as it leaves, with the id that it has at the ingress.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve_apps.metrics import gauge
from serve_apps.ray_process import has_ray

_log = logging.getLogger("ray.serve")
RECENT = 32
"""Requests that the mean work of a request is taken over."""


@dataclass
class RequestWork:
    """Work of one request; `amount` is None until it is known and may grow after that.

    It waits until `begun` is set.
    """

    amount: float | None = None
    begun: bool = False


class WorkInFlight:
    """Work of the requests that a replica holds. Not for several threads."""

    def __init__(self, modality: str, unit: str):
        self._modality, self._unit = modality, unit
        self._held: list[RequestWork] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._shown = gauge("mmllm_work_in_flight", modality=modality, unit=unit)
        self._waiting, self._running = (
            gauge("mmllm_waiting", modality=modality),
            gauge("mmllm_running", modality=modality),
        )
        self._replica = gauge("mmllm_replicas", modality=modality)
        self._replica.set(1)
        self._show()

    @contextmanager
    def request(self, amount: float | None = None) -> Iterator[RequestWork]:
        """Hold a request for as long as the block runs."""
        request, began = RequestWork(amount), time.perf_counter()
        id = _serve_request_id()  # now, for a stream that is closed may end in another context
        self._held.append(request)
        self._show()
        try:
            yield request
        finally:
            # By identity: two requests of one amount are equal.
            self._held = [other for other in self._held if other is not request]
            if request.amount is not None:
                self._recent.append(request.amount)
            self._show()
            self._tell(request, time.perf_counter() - began, id)

    def begin(self, request: RequestWork) -> None:
        """Say that a request waits no longer."""
        if not request.begun:
            request.begun = True
            self._show()

    def stats(self) -> dict[str, float]:
        """What the autoscaler is told.

        Returns:
            `work`: of the requests whose work is known. `requests`: all that are held. `unweighed`: those whose work is
            not known yet. `work_per_request`: mean of the last `RECENT` requests that ended, where there was one.
        """
        self._show()
        unweighed = sum(request.amount is None for request in self._held)
        stats: dict[str, float] = {"work": self._work(), "requests": len(self._held), "unweighed": unweighed}
        if self._recent:
            stats["work_per_request"] = sum(self._recent) / len(self._recent)
        return stats

    def _tell(self, request: RequestWork, seconds: float, id: str) -> None:
        amount = request.amount or 0.0
        fields = {"modality": self._modality, self._unit: round(amount, 3), "seconds_held": round(seconds, 4)}
        extra: dict[str, object] = {"ray_serve_extra_fields": fields} | ({"request_id": id} if id else {})
        _log.info("%s: %g %s in %.3f s", self._modality, amount, self._unit, seconds, extra=extra)

    def _work(self) -> float:
        return sum(request.amount or 0.0 for request in self._held)

    def _show(self) -> None:
        begun = sum(request.begun for request in self._held)
        self._shown.set(self._work())
        self._waiting.set(len(self._held) - begun)
        self._running.set(begun)


def _serve_request_id() -> str:
    if not has_ray():
        return ""
    from ray.serve.context import _get_serve_request_context

    return str(_get_serve_request_context().request_id)
