"""Replicas that take requests in turn, each a lane, all advanced together by a tick of time; and callers that wait.

In: arrivals of a tick. Out: how long some of them wait, how many are done, what the lanes hold. Lanes count work and
requests and do not know single ones: a tick is a tau-leap (Gillespie, 2001), within which rates stay as they are. What
a request waits is computed from the lane that takes it at that moment. Does not know modalities or scaling.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Lanes = NDArray[np.int64]
_CHUNKS = 4
"""Arrivals are sent in so many lots a lane: of a lot none sees where the others went."""


def route(chance: np.random.Generator, load: Floats, n: int) -> Lanes:
    """Lanes of `n` requests, each the less loaded of two at random, as Serve chooses.

    Args:
        load: (n_lanes,) requests that each holds; not changed.

    Returns:
        (n,) indices of lanes.
    """
    n_lanes = len(load)
    if n_lanes == 1 or n == 0:
        return np.zeros(n, np.int64)
    if n > 3 * n_lanes:  # two choices keep so many arrivals even
        room = np.clip((n + load.sum()) / n_lanes - load, 0, None)
        ends = np.cumsum(room) * (n / room.sum())
        return np.minimum(np.searchsorted(ends, np.arange(n) + chance.random()), n_lanes - 1)
    one = chance.integers(0, n_lanes, n)
    other = (one + chance.integers(1, n_lanes, n)) % n_lanes
    lot = max(1, n_lanes // _CHUNKS)
    if n <= lot:
        return np.where(load[one] <= load[other], one, other)
    held, chosen = load.copy(), np.empty(n, np.int64)
    for begin in range(0, n, lot):
        some, others = one[begin : begin + lot], other[begin : begin + lot]
        picked = np.where(held[some] <= held[others], some, others)
        chosen[begin : begin + lot] = picked
        held += np.bincount(picked, minlength=n_lanes)
    return chosen


def hidden_wait(rate: Floats, seconds: float, tick_s: float) -> Floats:
    """Mean seconds that arrivals of one tick wait for each other, where a tick is long.

    The mean wait of an M/D/1 queue (Pollaczek and Khinchine), as much of it as builds up within a tick.
    """
    hidden = _hidden_share(tick_s, seconds)
    if not hidden or not seconds:  # a tick shorter than a request is told in full by the backlog
        return np.zeros_like(rate)
    busy = np.minimum(rate * seconds, 0.98)
    settled: Floats = -np.expm1(-tick_s / seconds * (1 - np.sqrt(busy)) ** 2)
    waits: Floats = settled * busy * (hidden * seconds / 2) / (1 - busy)
    return waits


def _hidden_share(tick_s: float, seconds: float) -> float:
    """How much of a queue is hidden within a tick: nothing of it while a tick is shorter than a request."""
    return min(1.0, max(0.0, 1 - seconds / tick_s))


@dataclass(slots=True)
class Told:
    """A request that is told of, for all that it stands for."""

    came: float
    kind: int
    weight: float
    seconds: float = 0.0
    """Until now."""


@dataclass
class Callers:
    """Requests that wait at their callers, first come first served, for a replica that takes them."""

    joined: float = 0.0
    gone: float = 0.0
    """Of all that ever joined."""
    _told: deque[tuple[float, float, Told]] = field(default_factory=deque)
    """(place among all that joined, when it joined, request)"""

    @property
    def queued(self) -> float:
        """That wait now."""
        return self.joined - self.gone

    @property
    def told(self) -> bool:
        """Whether any that is told waits."""
        return bool(self._told)

    def leave(self, now: float) -> list[Told]:
        """Those that are told and still wait, with the seconds that they have waited."""
        waiting = [request for _, _, request in self._told]
        for _, since, request in self._told:
            request.seconds += now - since
        self._told.clear()
        return waiting

    def pass_on(
        self, chance: np.random.Generator, now: float, n: int, room: int, told: list[Told]
    ) -> tuple[int, list[Told]]:
        """Let `n` requests join and as many go as there is room for.

        Args:
            told: of those that join.

        Returns:
            How many go, and the requests to be told among them, with the seconds that they waited.
        """
        before = self.joined
        self.joined += n
        sent = int(min(self.queued, room))
        self.gone += sent
        for at, request in zip(np.sort(chance.random(len(told))), told, strict=True):
            self._told.append((before + at * n, now, request))
        going = []
        while self._told and self._told[0][0] <= self.gone:
            _, since, request = self._told.popleft()
            request.seconds += now - since
            going.append(request)
        return sent, going


@dataclass
class QueueLanes:
    """Replicas that take requests one after another, or a few at once.

    Args:
        alone_s: seconds of a request that has a replica for itself.
        shared_s: of that, what requests in one batch take together.
        batch: requests that go together.
        slots: requests of a replica.
    """

    alone_s: float
    shared_s: float
    batch: float
    slots: int
    backlog: Floats = field(default_factory=lambda: np.zeros(0))
    """(n_lanes,) seconds that the requests held would take, each alone."""
    callers: Callers = field(default_factory=Callers)
    busy: float = 0.0
    """Share of the last tick that a lane had something to do, on average."""
    _hidden: float = 0.0
    _done: float = 0.0

    @property
    def n_lanes(self) -> int:
        """Replicas that run."""
        return len(self.backlog)

    @property
    def requests(self) -> float:
        """At all replicas."""
        return float(self._load().sum()) + self._hidden

    def resize(self, n: int) -> None:
        """Have `n` lanes; those that hold least go, and what they hold is done."""
        if n < len(self.backlog):
            kept = np.sort(self.backlog)[::-1]
            self._done += float(kept[n:].sum()) / self.alone_s
            self.backlog = kept[:n]
        elif n > len(self.backlog):
            self.backlog = np.concatenate([self.backlog, np.zeros(n - len(self.backlog))])

    def turnover(self, tick_s: float) -> float:
        """Requests that replicas which are all full end within a tick."""
        full = np.full(self.n_lanes, self.slots * self.alone_s)
        return float(self._speed(full).sum()) * tick_s / self.alone_s

    def advance(
        self, chance: np.random.Generator, now: float, tick_s: float, n: int, told: list[Told], speed: float = 1.0
    ) -> tuple[list[Told], int]:
        """Take `n` requests and let a tick pass.

        Args:
            speed: as fast as so, because others use the same hardware.

        Returns:
            Requests that are told and were taken, with seconds until they are done, and how many of all were done.
        """
        n_lanes = len(self.backlog)
        if n_lanes and not n and not self.callers.queued and not self.backlog.any():
            self.busy = self._hidden = 0.0
            return [], 0
        tick_s = tick_s * speed
        load = self._load()
        # What a lane ends within a long tick makes room within it.
        room = np.maximum(0, self.slots - load + int(tick_s / self.alone_s))
        sent, going = self.callers.pass_on(chance, now, n, int(room.sum()) if n_lanes else 0, told)
        if not n_lanes:
            self.busy = 0.0
            return [], 0
        lanes = route(chance, np.where(room > 0, load, 1e9), sent)
        took = np.bincount(lanes, minlength=n_lanes)
        within = hidden_wait(took / tick_s, self.alone_s, tick_s)  # (n_lanes,)
        if going:
            some = lanes[chance.integers(0, sent, len(going))] if sent else np.zeros(len(going), np.int64)
            at = chance.random(len(going))
            ahead = (np.maximum(1, took[some]) - 1) * self.alone_s - tick_s
            until = np.maximum(0, self.backlog[some] + at * ahead) + self.alone_s
            until = until / self._speed(until) + chance.exponential(1, len(going)) * within[some]
            for request, seconds in zip(going, until.tolist(), strict=True):
                request.seconds += seconds / speed
        hidden = _hidden_share(tick_s, self.alone_s) / tick_s
        self._hidden = float(took @ (within + self.alone_s)) * hidden
        self.backlog += took * self.alone_s
        most = tick_s * self._speed(self.backlog)
        left = np.maximum(0, self.backlog - most)
        ended = self.backlog - left
        self.busy = float((ended / most).sum()) / n_lanes
        self._done += float(ended.sum()) / self.alone_s
        self.backlog = left
        done = int(self._done + 1e-9)
        self._done -= done
        return going, done

    def _load(self) -> Floats:
        """(n_lanes,) requests."""
        return np.ceil(self.backlog / self.alone_s - 1e-9)

    def _speed(self, backlog: Floats) -> Floats:
        """How many times as fast as one by one a lane works."""
        if self.batch <= 1 or not self.shared_s:
            return np.ones_like(backlog)
        together = np.minimum(np.maximum(backlog / self.alone_s, 1), self.batch)
        return together * self.alone_s / (self.shared_s + together * (self.alone_s - self.shared_s))
