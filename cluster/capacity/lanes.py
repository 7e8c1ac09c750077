"""Replicas of one deployment, each a lane, all advanced together by a tick of time.

In: arrivals of a tick. Out: which lanes took them, how long each waits, what the lanes hold. Lanes count work and
requests and do not know single ones: a tick is a tau-leap (Gillespie, 2001), within which rates stay as they are. What a
request waits is computed from the lane that takes it at that moment. Does not know modalities, time of day or scaling.
"""

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
    held, chosen, lot = load.copy(), [], max(1, n_lanes // _CHUNKS)
    for begin in range(0, n, lot):
        size = min(lot, n - begin)
        one = chance.integers(0, n_lanes, size)
        other = (one + chance.integers(1, n_lanes, size)) % n_lanes
        picked = np.where(held[one] <= held[other], one, other)
        chosen.append(picked)
        if begin + lot < n:
            held += np.bincount(picked, minlength=n_lanes)
    return np.concatenate(chosen)


def _within(rate: Floats, seconds: Floats | float, tick_s: float) -> Floats:
    """Mean seconds that arrivals of one tick wait for each other, where a tick is long.

    The mean wait of an M/D/1 queue (Pollaczek and Khinchine), as much of it as builds up within a tick.
    """
    busy = np.minimum(rate * seconds, 0.98)
    settles = seconds / (1 - np.sqrt(busy)) ** 2
    share = np.where(settles > 0, -np.expm1(-tick_s / np.maximum(settles, 1e-12)), 0.0)
    # A tick shorter than a request is told in full by the backlog.
    return share * max_share(tick_s, seconds) * busy * seconds / (2 * (1 - busy))


def max_share(tick_s: float, seconds: Floats | float) -> Floats | float:
    """How much of a queue is hidden within a tick: nothing of it while a tick is shorter than a request."""
    return np.clip(1 - np.asarray(seconds) / tick_s, 0, 1)


@dataclass
class QueueLanes:
    """Replicas that take requests one after another, or a few at once.

    Args:
        alone_s: seconds of a request that has a replica for itself.
        shared_s: of that, what requests in one batch take together.
        batch: requests that go together.
    """

    alone_s: float
    shared_s: float
    batch: float
    backlog: Floats = field(default_factory=lambda: np.zeros(0))
    """(n_lanes,) seconds that the requests held would take, each alone."""
    held_up: float = 0.0
    """Requests that came while there was no replica."""
    _hidden: float = 0.0
    _done: float = 0.0

    @property
    def requests(self) -> float:
        """At all replicas."""
        if not self.backlog.size or not self.alone_s:
            return 0.0
        return float(np.ceil(self.backlog / self.alone_s - 1e-9).sum()) + self._hidden

    def resize(self, n: int) -> None:
        """Have `n` lanes; those that hold least go, and what waits for the first is theirs then."""
        if n < len(self.backlog):
            self._done += float(np.sort(self.backlog)[: len(self.backlog) - n].sum()) / self.alone_s
            self.backlog = np.sort(self.backlog)[::-1][:n]
        elif n > len(self.backlog):
            self.backlog = np.concatenate([self.backlog, np.zeros(n - len(self.backlog))])
        if n and self.held_up:
            self.backlog += self.held_up * self.alone_s / n
            self.held_up = 0.0

    def advance(
        self, chance: np.random.Generator, n: int, tick_s: float, n_told: int, first_in_s: float
    ) -> tuple[Floats, int]:
        """Take `n` requests and let a tick pass.

        Args:
            n_told: requests whose seconds are told, at most.
            first_in_s: seconds until there is a replica, where there is none.

        Returns:
            (min(n, n_told),) seconds of some of them until they are done, and how many of all were done in the tick.
        """
        told = min(n, n_told)
        if not len(self.backlog):
            waits = first_in_s + self.alone_s * (self.held_up + 1 + chance.random(told) * max(0, n - 1))
            self.held_up += n
            return waits, 0
        lanes = route(chance, np.ceil(self.backlog / max(self.alone_s, 1e-12)), n)
        took = np.bincount(lanes, minlength=len(self.backlog))
        waits = np.zeros(0)
        within = _within(took / tick_s, self.alone_s, tick_s)  # (n_lanes,)
        if told:
            some = lanes[:: -(-n // told)][:told] if n > told else lanes
            told = len(some)
            at = chance.random(told)
            before = np.maximum(0, self.backlog[some] + at * ((took[some] - 1) * self.alone_s - tick_s))
            hidden = within[some] * 1.0
            waits = (before + self.alone_s) / self._speed((before + self.alone_s)) + chance.exponential(1, told) * hidden
        self.backlog += took * self.alone_s
        self._hidden = float((took / tick_s * (within + self.alone_s)).sum() * max_share(tick_s, self.alone_s))
        left = np.maximum(0, self.backlog - tick_s * self._speed(self.backlog))
        self._done += float((self.backlog - left).sum()) / self.alone_s
        self.backlog = left
        done = int(self._done + 1e-9)
        self._done -= done
        return waits, done

    def _speed(self, backlog: Floats) -> Floats:
        """How many times as fast as one by one a lane works."""
        if self.batch <= 1 or not self.shared_s:
            return np.ones_like(backlog)
        together = np.clip(backlog / self.alone_s, 1, self.batch)
        return together * self.alone_s / (self.shared_s + together * (self.alone_s - self.shared_s))


@dataclass
class DecodeLanes:
    """Replicas that answer many at once, a token of each in a step, and read prompts by pieces in the same steps.

    Args:
        step_s, answer_s, position_s: seconds of a step, and more for each answer and position in it.
        step_positions: that a step has room for.
        slots: requests of a replica.
        answer: tokens of an answer on average; lengths are exponential, which changes how many are held little, for
            lanes share their time (a processor-sharing queue's mean does not depend on more than the mean).
    """

    step_s: float
    answer_s: float
    position_s: float
    step_positions: int
    slots: int
    answer: float
    decoding: Lanes = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n_lanes,) answers that are told."""
    reading: Lanes = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n_lanes,) prompts that are not read to their end."""
    unread: Floats = field(default_factory=lambda: np.zeros(0))
    """(n_lanes,) positions of them."""
    queued: float = 0.0
    """Requests that wait at the callers."""
    ended: float = 0.0
    """Answers a second that end, in the last seconds."""

    def resize(self, n: int) -> None:
        """Have `n` lanes; those that hold least go."""
        have = len(self.decoding)
        if n < have:
            keep = np.argsort(-(self.decoding + self.reading), kind="stable")[:n]
            self.decoding, self.reading, self.unread = self.decoding[keep], self.reading[keep], self.unread[keep]
        elif n > have:
            more = np.zeros(n - have, np.int64)
            self.decoding, self.reading = np.concatenate([self.decoding, more]), np.concatenate([self.reading, more])
            self.unread = np.concatenate([self.unread, more.astype(float)])

    def advance(
        self, chance: np.random.Generator, n: int, prompt: float, tick_s: float, n_told: int
    ) -> Floats:
        """Take `n` requests of `prompt` positions each on average and let a tick pass.

        Returns:
            (n_told,) seconds from a request's coming to its first token, for requests of `prompt` positions.
        """
        waiting = self.queued
        free = np.maximum(0, self.slots - self.decoding - self.reading)
        room = int(free.sum())
        sent = min(n + int(waiting), room)
        load = np.where(free > 0, (self.decoding + self.reading).astype(float), 1e9)
        lanes = np.minimum(route(chance, load, sent), len(load) - 1)
        took = np.minimum(np.bincount(lanes, minlength=len(load)), free)
        sent = int(took.sum())
        self.queued = max(0.0, waiting + n - sent)
        waits = self._waits(chance, load, took, prompt, tick_s, n_told, waiting)
        self.reading = self.reading + took
        self.unread = self.unread + took * prompt
        self._step(chance, tick_s)
        return waits

    def _step_of(self, decoding: NDArray) -> Floats:
        return self.step_s + self.answer_s * decoding

    def _waits(
        self,
        chance: np.random.Generator,
        load: Floats,
        took: Lanes,
        prompt: float,
        tick_s: float,
        n_told: int,
        waiting: float,
    ) -> Floats:
        if not n_told:
            return np.zeros(0)
        one = chance.integers(0, len(load), n_told)
        other = chance.integers(0, len(load), n_told)
        lane = np.where(load[one] <= load[other], one, other)
        taken = np.repeat(np.arange(len(took)), took)
        if taken.size:  # of those that came in this tick
            lane = taken[chance.integers(0, taken.size, n_told)]
        step = self._step_of(self.decoding[lane])
        busy = (self.decoding[lane] + self.reading[lane]) > 0
        at = chance.random(n_told)
        ahead = np.maximum(0, self.unread[lane] + at * (np.maximum(0, took[lane] - 1) * prompt))
        room = np.maximum(1, self.step_positions - self.decoding[lane])
        own = np.ceil((ahead + prompt) / room) * step + self.position_s * (ahead + prompt)
        within = _within(took / tick_s, self.position_s * prompt + self.step_s, tick_s)[lane]
        waits = own + chance.exponential(1, n_told) * within
        waits += np.where(busy, chance.random(n_told) * (step + self.position_s * np.minimum(ahead, room)), 0.0)
        full = (waiting >= 1) | (self.decoding[lane] + self.reading[lane] >= self.slots)
        rate = max(self.ended, 1e-9, len(load) / float(self.answer * self._step_of(np.array(self.slots))))
        return waits + np.where(full, (waiting + at) / rate, 0.0)

    def _step(self, chance: np.random.Generator, tick_s: float) -> None:
        step = self._step_of(self.decoding)
        room = np.maximum(1, self.step_positions - self.decoding)
        most = room * tick_s / (step + self.position_s * room)
        read = np.minimum(self.unread, most)  # positions
        steps = np.maximum(0, tick_s - self.position_s * read) / step
        left = self.unread - read
        still = np.ceil(self.reading * left / np.maximum(self.unread, 1e-9) - 1e-9).astype(np.int64)
        begun = self.reading - still
        over = chance.binomial(self.decoding, -np.expm1(-steps / max(1.0, self.answer - 1)))
        over_now = np.zeros_like(begun)
        if steps.size and steps.max() > 1:  # a tick of several steps: what began within it may end within it
            over_now = chance.binomial(begun, -np.expm1(-steps / 2 / max(1.0, self.answer - 1)))
        self.decoding = self.decoding + begun - over - over_now
        self.reading, self.unread = still, left
        share = min(1.0, tick_s / 10.0)
        self.ended += share * (float((over + over_now).sum()) / tick_s - self.ended)
