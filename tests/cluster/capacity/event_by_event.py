"""The same service, followed event by event: every request, every batch, every clip, every step of the LM.

The yardstick of `cluster.capacity.simulation`: slow, and with nothing in common with it but the policy and Serve's
delays (`Scaler`), which both ask.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cluster.capacity.scaling import Held, Scaler
from cluster.capacity.service_times import ServiceTimes
from cluster.capacity.simulation import Shape
from cluster.capacity.traces import Trace
from serve_apps.config import ServeConfig


@dataclass(eq=False)
class Request:
    came: float
    kind: int
    prompt: float
    answer: int
    unread: float = 0.0
    told: int = 0
    first: float = 0.0


@dataclass(eq=False)
class Replica:
    held: list[Request] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    busy: bool = False


class EventByEvent:
    """One run.

    Args:
        scalers: by modality, as `Simulation` makes them; with `scaling` None so many replicas run for ever.
        turns: the models of the n-th replica of each part take turns: what begins while others compute takes as many
            times as long.
    """

    def __init__(
        self,
        config: ServeConfig,
        times: ServiceTimes,
        trace: Trace,
        shape: Shape,
        scalers: dict[str, Scaler],
        seed: int,
        turns: bool = False,
    ):
        self.turns = turns
        self.config, self.times, self.trace, self.shape, self.scalers = config, times, trace, shape, scalers
        self.chance = np.random.default_rng(seed)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.number = itertools.count()
        self.now = 0.0
        self.replicas = {name: [Replica() for _ in range(s.running)] for name, s in scalers.items()}
        self.queues: dict[str, deque[Request]] = {name: deque() for name in scalers}
        self.done: list[Request] = []
        self.counts: dict[str, list[int]] = {name: [] for name in scalers}

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.number), what))

    def run(self) -> list[Request]:
        """Requests that came in the trace's time, with `first` set."""
        self._arrive()
        if any(scaler.scaling for scaler in self.scalers.values()):
            self._scale()
        while self.events:
            self.now, _, what = heapq.heappop(self.events)
            if self.now > self.trace.seconds + 600:
                break
            what()
        return self.done

    def _arrive(self) -> None:
        most = self.trace.peak_rps
        self.now += self.chance.exponential(1 / most)
        if self.now >= self.trace.seconds:
            return

        def come(came: float = self.now) -> None:
            rates = self.trace.rates(np.array([came]))[0]
            if self.chance.random() < rates.sum() / most:
                kind = int(self.chance.choice(3, p=rates / rates.sum()))
                more = (0, self.shape.images * self.times.text.positions_per_image,
                        self.shape.audio_seconds * self.times.audio.tokens_per_second)  # fmt: skip
                answer = 1 + self.chance.poisson(self.chance.exponential(self.shape.answer_tokens - 1))
                request = Request(came, kind, self.shape.prompt_tokens + more[kind], answer)
                if kind == 0:
                    self.send("text", request)
                else:
                    self.send(("vision", "audio")[kind - 1], request)
            self._arrive()

        self.at(self.now, come)

    def part(self, name: str):
        return {"vision": self.config.clip, "audio": self.config.whisper, "text": self.config.phi}[name]

    def send(self, name: str, request: Request) -> None:
        replicas = self.replicas[name]
        free = [r for r in replicas if len(r.held) < self.part(name).max_ongoing_requests]
        if not free:
            self.queues[name].append(request)
            return
        two = self.chance.choice(len(replicas), min(2, len(replicas)), replace=False)
        chosen = [replicas[i] for i in two if replicas[i] in free] or free
        replica = min(chosen, key=lambda r: len(r.held))
        replica.held.append(request)
        replica.waiting.append(request)
        if name == "text":
            request.unread = request.prompt
        if not replica.busy:
            self.work(name, replica)

    def work(self, name: str, replica: Replica) -> None:
        """Begin what a replica does next."""
        {"vision": self.batch, "audio": self.clip, "text": self.step}[name](replica)

    def batch(self, replica: Replica) -> None:
        if not replica.waiting:
            replica.busy = False
            return
        most = max(1, self.config.clip.max_batch_size // self.shape.images)
        taken = [replica.waiting.popleft() for _ in range(min(most, len(replica.waiting)))]
        t = self.times.vision
        self.spend("vision", replica, taken, t.seconds_per_batch + t.seconds_per_image * self.shape.images * len(taken))

    def clip(self, replica: Replica) -> None:
        if not replica.waiting:
            replica.busy = False
            return
        t = self.times.audio
        seconds = t.seconds_per_clip + t.seconds_per_second * self.shape.audio_seconds
        self.spend("audio", replica, [replica.waiting.popleft()], seconds)

    def slowed(self, name: str, replica: Replica) -> int:
        """How many models compute at a replica, the one that begins included."""
        if not self.turns:
            return 1
        at = self.replicas[name].index(replica)
        return 1 + sum(part != name and replicas[at].busy for part, replicas in self.replicas.items())

    def spend(self, name: str, replica: Replica, taken: list[Request], seconds: float) -> None:
        replica.busy = True

        def ended() -> None:
            for request in taken:
                self.leave(name, replica, request)
                self.send("text", request)
            self.work(name, replica)

        self.at(self.now + seconds * self.slowed(name, replica), ended)

    def leave(self, name: str, replica: Replica, request: Request) -> None:
        replica.held.remove(request)
        if self.queues[name]:
            self.send(name, self.queues[name].popleft())

    def step(self, replica: Replica) -> None:
        replica.waiting.clear()
        if not replica.held:
            replica.busy = False
            return
        replica.busy = True
        telling = [r for r in replica.held if r.unread <= 0]
        room = max(1.0, self.config.phi.step_tokens - len(telling))
        read = 0.0
        begun: list[Request] = []
        for request in replica.held:
            if request.unread > 0 and room > 0:
                some = min(room, request.unread)
                request.unread, room, read = request.unread - some, room - some, read + some
                if request.unread <= 0:
                    begun.append(request)
        t = self.times.text
        seconds = t.seconds_per_step + t.seconds_per_answer * len(telling) + t.seconds_per_position * read

        def ended() -> None:
            for request in begun:
                request.first = self.now - request.came + self.times.ingress.seconds_per_request
                self.done.append(request)
            for request in [*begun, *telling]:
                request.told += 1
                if request.told >= request.answer:
                    self.leave("text", replica, request)
            self.step(replica)

        self.at(self.now + seconds * self.slowed("text", replica), ended)

    def _scale(self, every: float = 0.1) -> None:
        units = {"vision": float(self.shape.images), "audio": self.shape.audio_seconds}
        for name, scaler in self.scalers.items():
            held = [request for replica in self.replicas[name] for request in replica.held]
            if name == "text":
                work = sum(request.prompt + request.told for request in held)
                unit = self.shape.prompt_tokens + self.shape.answer_tokens
            else:
                unit = units[name]
                work = unit * len(held)
            seen = Held(work, len(held), len(self.queues[name]))
            scaler.follow(self.now, scaler.desired(self.now, every, seen, unit))
            replicas = self.replicas[name]
            while len(replicas) < scaler.running:
                replicas.append(Replica())
            for replica in sorted(replicas, key=lambda r: len(r.held))[: len(replicas) - scaler.running]:
                replicas.remove(replica)  # it ends what it holds
            for _ in range(len(self.queues[name])):
                self.send(name, self.queues[name].popleft())
            self.counts[name].append(scaler.running + sum(n for _, n in scaler.starting))
        if self.now < self.trace.seconds:
            self.at(self.now + every, self._scale)
