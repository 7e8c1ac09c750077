"""The service under a load, simulated: ingress, then CLIP and Whisper at once, then the LM, and replicas that follow.

In: service times, a serve config, a trace. Out: replicas over time, and seconds to the first token. Every replica is
simulated, requests are counted, and of every tick some are told: the time that it takes depends on replicas and ticks,
not on requests. `tests/cluster/capacity/event_by_event.py` follows every request and every step; tests compare both.
Does not know prices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.capacity.decode_lanes import DecodeLanes
from cluster.capacity.lanes import QueueLanes, Told
from cluster.capacity.outcome import Outcome, Record
from cluster.capacity.scaling import Held, Scaler
from cluster.capacity.service_times import ServiceTimes
from cluster.capacity.traces import Trace
from cluster.capacity.turns import share_in_turns
from cluster.modalities import FIELDS, RESOURCES
from serve_apps.admission import capacity
from serve_apps.autoscaling import Targets
from serve_apps.autoscaling_config import Autoscaling
from serve_apps.config import DeploymentConfig, ServeConfig

PARTS = RESOURCES
Way = Literal["apart", "whole", "packed"]
"""How it is scaled. `apart`: each modality by itself. `whole`: one deployment, whose replicas hold all three models,
each with what it reserves for itself. `packed`: the same, and a replica's models take turns on what the
largest reserves."""
FINE_TICKS = 12_000
"""Of a trace, as long as none is longer than `LONGEST_TICK_S`, of which more would change results by some percent."""
LONGEST_TICK_S = 4.0
DRAIN_S = 3_600.0
"""After a trace, at most, for requests that still wait."""
TICK_S = 0.1
WARM_S = 300.0
_TOLD = 60_000
"""Requests of each kind that are told of a trace, at least, if so many come; no more than `_TOLD_AT_ONCE` in a tick."""
_TOLD_AT_ONCE = 8
_TELL_EVERY = 200
Tell = Callable[[int], object]
_INGRESS_USE = 0.7
"""Share of its time that an ingress replica may compute."""


@dataclass(frozen=True)
class Shape:
    """What one request brings along and asks for, on average."""

    prompt_tokens: int = 200
    """Typed, with the chat template; images and speech come on top."""
    answer_tokens: int = 150
    images: int = 1
    """Of a request with images."""
    audio_seconds: float = 6.0
    """Of a request with sound."""


class Simulation:
    """One run.

    Args:
        way: other than `apart`, replicas follow the modality that asks for most, by the same policy, with the LM's
            delays and the start of the slowest model; all models begin to load at once, and a request may be seen by
            another replica than answers it: both are kinder to it than reality.
    """

    def __init__(
        self,
        config: ServeConfig,
        times: ServiceTimes,
        trace: Trace,
        shape: Shape = Shape(),
        *,
        way: Way = "apart",
        seed: int = 0,
        tick_s: float | None = None,
    ):
        self._config, self._times, self._trace, self._shape = config, times, trace, shape
        self._way = way
        self._chance = np.random.default_rng(seed)
        self._tick_s = tick_s or max(TICK_S, min(trace.seconds / FINE_TICKS, LONGEST_TICK_S))
        self._told = min(_TOLD_AT_ONCE, int(np.ceil(_TOLD * self._tick_s / trace.seconds)))
        self._parts: dict[str, DeploymentConfig] = {name: getattr(config, field) for name, field in FIELDS.items()}
        self._held_by_ingress = capacity(config)
        vision, audio, text = times.vision, times.audio, times.text
        self._vision = QueueLanes(
            vision.seconds_per_batch + vision.seconds_per_image * shape.images,
            vision.seconds_per_batch,
            config.clip.max_batch_size / max(1, shape.images),
            config.clip.max_ongoing_requests,
        )
        self._audio = QueueLanes(
            audio.seconds_per_clip + audio.seconds_per_second * shape.audio_seconds,
            0.0,
            1.0,
            config.whisper.max_ongoing_requests,
        )
        self._prompts = np.array(
            [
                shape.prompt_tokens,
                shape.prompt_tokens + shape.images * text.positions_per_image,
                shape.prompt_tokens + shape.audio_seconds * audio.tokens_per_second,
            ]
        )  # (3,) by kind
        share = trace.mix.shares
        self._prompt = float(share @ self._prompts)
        reserved = (self._prompt + shape.answer_tokens) * text.kv_bytes_per_token
        self._kv_share = reserved / config.phi.kv_cache_bytes  # of one request
        self._text = DecodeLanes(
            text.seconds_per_step,
            text.seconds_per_answer,
            text.seconds_per_position,
            config.phi.step_tokens,
            max(1, min(config.phi.max_ongoing_requests, int(1 / self._kv_share))),
            float(shape.answer_tokens),
            self._prompt,
        )
        self._scalers = self._make_scalers()

    def alone_s(self) -> NDArray[np.float64]:
        """(3,) seconds to the first token, by kind, of a request that meets nobody."""
        perceived = np.array([0.0, self._vision.alone_s, self._audio.alone_s])
        pieces = np.ceil(self._prompts / self._text.step_positions)
        read = pieces * float(self._text.step_of(0.0)) + self._prompts * self._text.position_s
        return self._times.ingress.seconds_per_request + perceived + read

    @property
    def n_ticks(self) -> int:
        """Of the trace."""
        return int(np.ceil(self._trace.seconds / self._tick_s))

    def run(self, tell: Tell = lambda n: None) -> Outcome:
        """Simulate all of it, after a while in which replicas come to what the beginning needs.

        Args:
            tell: called now and then, with the ticks that have passed since.
        """
        tick_s = self._tick_s
        n_warm, n = int(WARM_S / max(tick_s, 0.25)), self.n_ticks
        for scaler in self._scalers.values():
            scaler.hurry(True)
        calm = self._trace.rates(np.zeros(1))[0]
        for tick in range(-n_warm, 0):
            warm_s = max(tick_s, 0.25)
            self._tick(tick * warm_s, warm_s, self._chance.poisson(calm * warm_s), None)
        for scaler in self._scalers.values():
            scaler.hurry(False)
        record = Record(self._trace.seconds, n, tick_s)
        rates = self._trace.rates((np.arange(n) + 0.5) * tick_s)  # (n, 3)
        for tick, came in enumerate(self._chance.poisson(rates * tick_s)):
            self._tick(tick * tick_s, tick_s, came, record)
            record.end(tick, rates[tick], self._counts(float(rates[tick].sum())))
            if (tick + 1) % _TELL_EVERY == 0:
                tell(_TELL_EVERY)
        self._drain(n * tick_s, record)
        return record.outcome()

    def _drain(self, now: float, record: Record) -> None:
        """Let requests that still wait come to a replica; those that do not within `DRAIN_S` are told as waiting."""
        nobody, tick_s = np.zeros(3, np.int64), self._tick_s
        end = now + DRAIN_S
        parts = (self._vision, self._audio, self._text)
        while now < end and any(lanes.callers.told for lanes in parts):
            self._tick(now, tick_s, nobody, record)
            now += tick_s
        for lanes in parts:
            record.told += lanes.callers.leave(now)

    def _make_scalers(self) -> dict[str, Scaler]:
        rates = self._trace.rates(np.zeros(1))[0]  # (3,)
        step = self._text.step_of(self._text.slots / 2)
        busy = {
            "vision": rates[1] * self._vision.alone_s,
            "audio": rates[2] * self._audio.alone_s,
            "text": rates.sum() * self._shape.answer_tokens * float(step) / (self._text.slots / 2),
        }
        starts = {name: getattr(self._times, name).start_seconds for name in PARTS}
        together = self._together()
        found: dict[str, Scaler] = {}
        first: dict[str, int] = {}
        for name, part in self._parts.items():
            scaling = together or part.autoscaling
            targets = (
                part.autoscaling.targets(part.max_ongoing_requests)  # type: ignore[attr-defined]
                if part.autoscaling
                else Targets(1.0, 1.0, part.max_ongoing_requests)
            )
            least, most = (scaling.min_replicas, scaling.max_replicas) if scaling else (part.max_replicas,) * 2
            first[name] = min(max(int(np.ceil(busy[name] / 0.7)), least), most)
            start_s = starts[name] if self._way == "apart" else max(starts.values())
            found[name] = Scaler(scaling, targets, start_s, first[name])
        if self._way != "apart":
            for scaler in found.values():
                scaler.wanted = scaler.running = max(first.values())
        return found

    def _together(self) -> Autoscaling | None:
        """Delays and bounds of a deployment that is scaled whole: the LM's, with as many replicas as any part wants."""
        scalings = [part.autoscaling for part in self._parts.values() if part.autoscaling]
        if self._way == "apart" or not self._config.phi.autoscaling:
            return None
        least = max(1, *(scaling.min_replicas for scaling in scalings))
        return self._config.phi.autoscaling.model_copy(update={"min_replicas": least})

    def _speeds(self) -> dict[str, float]:
        """How fast each model computes beside those that take turns with it: of n that are busy each has an n-th."""
        if self._way != "packed":
            return dict.fromkeys(PARTS, 1.0)
        busy = {"vision": self._vision.busy, "audio": self._audio.busy, "text": self._text.busy}
        on_gpu = {name: getattr(self._times, name).hardware.gpus > 0 for name in PARTS}
        return {
            name: share_in_turns([busy[other] for other in PARTS if other != name and on_gpu[other] == on_gpu[name]])
            for name in PARTS
        }

    def _counts(self, rps: float) -> dict[str, float]:
        """Replicas that are paid for."""
        counts: dict[str, float] = {
            name: s.running + sum(n for _, n in s.starting) for name, s in self._scalers.items()
        }
        counts["ingress"] = self._n_ingress(rps)
        return counts

    def _n_ingress(self, rps: float) -> float:
        """As many as hold what the LM's replicas can, and compute no more than they should."""
        of_lm = self._scalers["text"].running * self._config.phi.max_ongoing_requests
        by_time = rps * self._times.ingress.seconds_per_request / _INGRESS_USE
        return float(max(1, math.ceil(by_time), math.ceil(of_lm / self._held_by_ingress)))

    @property
    def _inside(self) -> float:
        return sum(lanes.requests + lanes.callers.queued for lanes in (self._vision, self._audio, self._text))

    def _tick(self, now: float, tick_s: float, came: NDArray[np.int64], record: Record | None) -> None:
        """Let requests of each kind come, and time pass."""
        self._scale(now, tick_s)
        arrived = int(came.sum())
        n_ingress = self._n_ingress(arrived / tick_s)
        room = max(0.0, n_ingress * self._held_by_ingress - self._inside) + self._text.turnover(tick_s)
        let_in = came if arrived <= room else self._chance.binomial(came, room / arrived)
        entered = let_in.tolist()
        speeds = self._speeds()
        told = self._telling(now, 0, entered[0]) if record else []
        perceived = entered[0]
        for kind, name, lanes in ((1, "vision", self._vision), (2, "audio", self._audio)):
            entered[kind] = self._admitted(entered[kind], lanes, self._parts[name], n_ingress, tick_s)
            some = self._telling(now, kind, entered[kind]) if record else []
            taken, done = lanes.advance(self._chance, now, tick_s, entered[kind], some, speeds[name])
            told, perceived = told + taken, perceived + done
        n = self._admitted(perceived, self._text, self._config.phi, n_ingress, tick_s)
        first = self._text.advance(self._chance, now, tick_s, n, told, speeds["text"])
        if record:
            record.arrived += arrived
            record.refused += arrived - sum(entered) + perceived - n
            record.told += first

    def _telling(self, now: float, kind: int, n: int) -> list[Told]:
        """Some of `n` requests that enter, with what they take whatever waits."""
        more = (self._prompts[kind] - self._prompt) * self._times.text.seconds_per_position
        seconds = self._times.ingress.seconds_per_request + float(more)
        some = min(n, self._told)
        return [Told(now, kind, n / some, seconds) for _ in range(some)]

    @staticmethod
    def _admitted(
        n: int, lanes: QueueLanes | DecodeLanes, part: DeploymentConfig, n_ingress: float, tick_s: float
    ) -> int:
        """How many of `n` are not refused: every ingress replica lets so many wait."""
        if part.max_queued_requests < 0:
            return n
        free = lanes.n_lanes * part.max_ongoing_requests - lanes.requests
        room = max(0.0, free) + lanes.turnover(tick_s) + part.max_queued_requests * n_ingress - lanes.callers.queued
        return int(min(n, max(0, room)))

    def _scale(self, now: float, tick_s: float) -> None:
        shape = self._shape
        units = {"vision": float(shape.images), "audio": shape.audio_seconds}
        desired = {}
        for name, lanes in (("vision", self._vision), ("audio", self._audio)):
            held = Held(lanes.requests * units[name], lanes.requests, lanes.callers.queued)
            desired[name] = self._scalers[name].desired(now, tick_s, held, units[name])
        lm, running = self._text, max(1, self._scalers["text"].running)
        telling, reading = float(lm.decoding.sum()), float(lm.reading.sum())
        work = (telling + reading) * self._prompt + telling * shape.answer_tokens
        kv_use = min(1.0, (telling + reading) / running * self._kv_share)
        held = Held(work, lm.requests, lm.callers.queued, kv_use)
        desired["text"] = self._scalers["text"].desired(now, tick_s, held, self._prompt + shape.answer_tokens)
        if self._way != "apart" and self._config.phi.autoscaling:
            desired = dict.fromkeys(desired, max(desired.values()))
        for name, scaler in self._scalers.items():
            scaler.follow(now, desired[name])
        self._vision.resize(self._scalers["vision"].running)
        self._audio.resize(self._scalers["audio"].running)
        self._text.resize(self._scalers["text"].running)
