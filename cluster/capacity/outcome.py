"""What came of a simulated load: replicas over time, and seconds to the first token of requests that are told."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.capacity.lanes import Told
from cluster.capacity.traces import KINDS

SHOWN = 1_000
"""Moments that an outcome keeps replicas of."""


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    seconds: float
    at: NDArray[np.float64]
    """(n,) seconds of the moments below, evenly spaced; what is kept of each is the mean since the one before."""
    replicas: dict[str, NDArray[np.float64]]
    """(n,) by modality, and of the ingress; those that start are paid and counted."""
    rates: NDArray[np.float64]
    """(n, 3) requests a second of each kind."""
    first_s: NDArray[np.float64]
    """(m,) seconds to the first token of the requests that are told."""
    kinds: NDArray[np.int64]
    """(m,) indices into `KINDS`."""
    weights: NDArray[np.float64]
    """(m,) requests that each stands for."""
    arrived: int
    refused: int
    """With 429, for too many waited."""

    def share_within(self, seconds: float) -> float:
        """Share of all that came, refused ones too, that has its first token within so many seconds."""
        return float(self.weights[self.first_s <= seconds].sum()) / max(1, self.arrived)

    def ttft(self, share: float, kind: str | None = None) -> float | None:
        """Seconds within which a share of the requests has its first token; None if there were none."""
        chosen = slice(None) if kind is None else self.kinds == KINDS.index(kind)
        return quantile(self.first_s[chosen], self.weights[chosen], share)


def quantile(values: NDArray[np.float64], weights: NDArray[np.float64], share: float) -> float | None:
    """The value that a share of the weight lies at or below."""
    if not values.size:
        return None
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, share * reached[-1])])


class Record:
    """What is kept of a run."""

    def __init__(self, seconds: float, n_ticks: int, tick_s: float):
        self._seconds, self._tick_s = seconds, tick_s
        self._every = max(1, n_ticks // SHOWN)
        self._sums: dict[str, float] = {}
        self._rates = np.zeros(3)
        self._n = 0
        self._kept: list[tuple[float, dict[str, float], NDArray[np.float64]]] = []
        self.told: list[Told] = []
        self.arrived = self.refused = 0

    def end(self, tick: int, rates: NDArray[np.float64], counts: dict[str, float]) -> None:
        """A tick has passed with so many replicas."""
        for name, count in counts.items():
            self._sums[name] = self._sums.get(name, 0.0) + count
        self._rates = self._rates + rates
        self._n += 1
        if self._n == self._every:
            means = {name: total / self._n for name, total in self._sums.items()}
            self._kept.append(((tick + 1) * self._tick_s, means, self._rates / self._n))
            self._sums, self._rates, self._n = {}, np.zeros(3), 0

    def outcome(self) -> Outcome:
        """All of it."""
        names = self._kept[0][1]
        told = self.told
        return Outcome(
            self._seconds,
            np.array([at for at, _, _ in self._kept]),
            {name: np.array([counts[name] for _, counts, _ in self._kept]) for name in names},
            np.array([rates for _, _, rates in self._kept]),
            np.array([request.seconds for request in told]),
            np.array([request.kind for request in told], np.int64),
            np.array([request.weight for request in told]),
            self.arrived,
            self.refused,
        )
