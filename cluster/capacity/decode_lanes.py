"""Replicas of the LM, each a lane that tells many answers at once, all advanced together by a tick of time.

In: arrivals of a tick. Out: how long some of them wait for a first token, and what the lanes hold. As
`cluster.capacity.lanes`, of which it takes the callers and the way to a lane.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.capacity.lanes import Callers, Floats, Lanes, Told, hidden_wait, route


@dataclass
class DecodeLanes:
    """Replicas that answer many at once, a token of each in a step, and read prompts by pieces in the same steps.

    Args:
        step_s, answer_s, position_s: seconds of a step, and more for each answer and position in it.
        step_positions: that a step has room for.
        slots: requests of a replica.
        prompt: positions of a prompt on average.
        answer: tokens of an answer on average; lengths are exponential, which changes how many are held little, for
            lanes share their time (a processor-sharing queue's mean does not depend on more than the mean).
    """

    step_s: float
    answer_s: float
    position_s: float
    step_positions: int
    slots: int
    answer: float
    prompt: float
    decoding: Lanes = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n_lanes,) answers that are told."""
    reading: Lanes = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n_lanes,) prompts that are not read to their end."""
    unread: Floats = field(default_factory=lambda: np.zeros(0))
    """(n_lanes,) positions of them."""
    callers: Callers = field(default_factory=Callers)
    busy: float = 0.0
    """Share of the last tick that a lane had something to do, on average."""

    @property
    def n_lanes(self) -> int:
        """Replicas that run."""
        return len(self.decoding)

    @property
    def requests(self) -> float:
        """At all replicas."""
        return float(self.decoding.sum() + self.reading.sum())

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
        self,
        chance: np.random.Generator,
        now: float,
        tick_s: float,
        n: int,
        told: list[Told],
        speed: float = 1.0,
    ) -> list[Told]:
        """Take `n` requests and let a tick pass.

        Args:
            speed: as `QueueLanes.advance`.

        Returns:
            Requests that are told and were taken, with seconds until their first token.
        """
        tick_s = tick_s * speed
        load = (self.decoding + self.reading).astype(float)
        # What ends within a tick makes room within it.
        free = np.maximum(0, self.slots - load) + self.turnover(tick_s) / max(1, self.n_lanes)
        sent, going = self.callers.pass_on(chance, now, n, int(free.sum()), told)
        lanes = route(chance, np.where(free > 0, load, 1e9), sent)
        took = np.bincount(lanes, minlength=len(load))
        if going:
            waits = self._waits(chance, load, lanes, took, tick_s, len(going))
            for request, seconds in zip(going, waits.tolist(), strict=True):
                request.seconds += seconds / speed
        self.reading = self.reading + took
        self.unread = self.unread + took * self.prompt
        began = self.decoding + self.reading > 0
        self._step(chance, tick_s)
        self.busy = float((began.mean() + (self.decoding + self.reading > 0).mean()) / 2) if len(load) else 0.0
        return going

    def step_of(self, decoding: float | NDArray[Any]) -> Floats:
        """Seconds of a step in which so many answers are told."""
        return self.step_s + self.answer_s * np.asarray(decoding, float)

    def turnover(self, tick_s: float) -> float:
        """Requests that replicas which are all full end within a tick."""
        each_s = self.answer * float(self.step_of(self.slots)) / self.slots + self.prompt * self.position_s
        return self.n_lanes * tick_s / each_s

    def _steps(self, tick_s: float, read: float | Floats) -> Floats:
        """(n_lanes,) steps of a tick in which so many positions are read."""
        return np.maximum(0, tick_s - self.position_s * np.asarray(read)) / self.step_of(self.decoding)

    def _ended(self, steps: Floats) -> Floats:
        """Chance that an answer which is told ends within so many steps."""
        return -np.expm1(-steps / max(1.0, self.answer - 1))

    def _waits(
        self,
        chance: np.random.Generator,
        load: Floats,
        lanes: Lanes,
        took: Lanes,
        tick_s: float,
        n: int,
    ) -> Floats:
        # As those that were taken in this tick.
        lane = lanes[chance.integers(0, lanes.size, n)] if lanes.size else route(chance, load, n)
        step = self.step_of(self.decoding[lane])
        prompt = self.prompt
        alone_s = self.position_s * prompt + self.step_s
        # Of a tick that is longer than a prompt takes, little of what came before is still ahead.
        before = chance.random(n) * np.maximum(0, took[lane] - 1) * prompt * min(1.0, alone_s / tick_s)
        ahead = self.unread[lane] + before
        room = np.maximum(1, self.step_positions - self.decoding[lane])
        own = np.ceil((ahead + prompt) / room) * step + self.position_s * (ahead + prompt)
        own += chance.exponential(1, n) * hidden_wait(took / tick_s, alone_s, tick_s)[lane]
        rest = chance.random(n) * (step + self.position_s * np.minimum(ahead, room))  # of the step that runs
        return own + np.where(load[lane] > 0, rest, 0.0)

    def _step(self, chance: np.random.Generator, tick_s: float) -> None:
        step = self.step_of(self.decoding)
        room = np.maximum(1, self.step_positions - self.decoding)
        most = room * tick_s / (step + self.position_s * room)
        read = np.minimum(self.unread, most)  # positions
        steps = self._steps(tick_s, read)
        left = self.unread - read
        still = np.ceil(self.reading * left / np.maximum(self.unread, 1e-9) - 1e-9).astype(np.int64)
        begun = self.reading - still
        over = chance.binomial(self.decoding, self._ended(steps))
        over_now = np.zeros_like(begun)
        if steps.size and steps.max() > 1:  # a tick of several steps: what began within it may end within it
            share = np.maximum(steps, 1e-9) / max(1.0, self.answer - 1)  # of an answer; they begin at any moment
            over_now = chance.binomial(begun, np.clip(1 + np.expm1(-share) / share, 0, 1))
        self.decoding = self.decoding + begun - over - over_now
        self.reading, self.unread = still, left
