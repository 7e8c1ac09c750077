"""How much a replica has to do, in its modality's unit: images, seconds of audio, or tokens.

Counts from when a request reaches the replica until it leaves, so what waits inside counts too. Does not know what the
work is, nor how many replicas it needs: `serve_apps.autoscaling` decides that from what `WorkInFlight.stats` says.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve_apps.metrics import gauge

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
        self._held: list[RequestWork] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._gauge = gauge("mmllm_work_in_flight")
        self._gauge.set_default_tags({"modality": modality, "unit": unit})
        self._waiting, self._running = gauge("mmllm_waiting"), gauge("mmllm_running")
        for shown in (self._waiting, self._running):
            shown.set_default_tags({"modality": modality})
        self._show()

    @contextmanager
    def request(self, amount: float | None = None) -> Iterator[RequestWork]:
        """Hold a request for as long as the block runs."""
        request = RequestWork(amount)
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

    def _work(self) -> float:
        return sum(request.amount or 0.0 for request in self._held)

    def _show(self) -> None:
        begun = sum(request.begun for request in self._held)
        self._gauge.set(self._work())
        self._waiting.set(len(self._held) - begun)
        self._running.set(begun)
