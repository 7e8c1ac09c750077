"""The service under a load, simulated: ingress, then CLIP and Whisper at once, then the LM, and replicas that follow.

In: service times, a serve config, a trace. Out: replicas over time, and seconds to the first token. Every replica is
simulated, requests are counted, and of every tick some are told: the time that it takes depends on replicas and ticks,
not on requests. `tests/cluster/capacity/event_by_event.py` follows every request and every step; tests compare both.
Does not know prices.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.capacity.decode_lanes import DecodeLanes
from cluster.capacity.lanes import QueueLanes, Told
from cluster.capacity.scaling import Held, Scaler
from cluster.capacity.service_times import ServiceTimes
from cluster.capacity.traces import KINDS, Trace
from serve_apps.admission import capacity
from serve_apps.autoscaling import Targets
from serve_apps.config import DeploymentConfig, ServeConfig

PARTS = ("vision", "audio", "text")
MOST_TICKS = 40_000
TICK_S = 0.05
WARM_S = 300.0
_TOLD = 8
"""Requests of each kind that are told in a tick."""
_INGRESS_USE = 0.7
"""Share of its time that an ingress replica may compute."""
_SHOWN = 1_000
"""Moments that an outcome keeps replicas of."""


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
    told_at: NDArray[np.float64]
    """(m,) when they came."""
    kinds: NDArray[np.int64]
    """(m,) indices into `KINDS`."""
    weights: NDArray[np.float64]
    """(m,) requests that each stands for."""
    arrived: int
    refused: int
    """With 429, for too many waited."""

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


class Simulation:
    """One run.

    Args:
        whole: one deployment that holds all three models and is scaled whole: by what the modality asks for that asks
            for most, with at least one replica, and at the start of the slowest.
    """

    def __init__(
        self,
        config: ServeConfig,
        times: ServiceTimes,
        trace: Trace,
        shape: Shape = Shape(),
        *,
        whole: bool = False,
        seed: int = 0,
        tick_s: float | None = None,
    ):
        self._config, self._times, self._trace, self._shape = config, times, trace, shape
        self._whole = whole
        self._chance = np.random.default_rng(seed)
        self._tick_s = tick_s or max(TICK_S, trace.seconds / MOST_TICKS)
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
        )
        self._scalers = self._make_scalers()

    def run(self) -> Outcome:
        """Simulate all of it, after a while in which replicas come to what the beginning needs."""
        tick_s = self._tick_s
        n_warm, n = int(WARM_S / max(tick_s, 0.25)), int(np.ceil(self._trace.seconds / tick_s))
        for scaler in self._scalers.values():
            scaler.hurry(True)
        calm = self._trace.rates(np.zeros(1))[0]
        for tick in range(-n_warm, 0):
            warm_s = max(tick_s, 0.25)
            self._tick(tick * warm_s, warm_s, self._chance.poisson(calm * warm_s), None)
        for scaler in self._scalers.values():
            scaler.hurry(False)
        record = _Record(self._trace.seconds, n, tick_s)
        rates = self._trace.rates((np.arange(n) + 0.5) * tick_s)  # (n, 3)
        for tick, came in enumerate(self._chance.poisson(rates * tick_s)):
            self._tick(tick * tick_s, tick_s, came, record)
            record.end(tick, rates[tick], self._counts(rates[tick]))
        return record.outcome()

    def _make_scalers(self) -> dict[str, Scaler]:
        rates = self._trace.rates(np.zeros(1))[0]  # (3,)
        step = self._text.step_of(self._text.slots / 2)
        busy = {
            "vision": rates[1] * self._vision.alone_s,
            "audio": rates[2] * self._audio.alone_s,
            "text": rates.sum() * self._shape.answer_tokens * float(step) / (self._text.slots / 2),
        }
        starts = {name: getattr(self._times, name).start_seconds for name in PARTS}
        found = {}
        for name, part in self._parts().items():
            scaling = part.autoscaling
            targets = (
                scaling.targets(part.max_ongoing_requests)  # type: ignore[attr-defined]
                if scaling
                else Targets(1.0, 1.0, part.max_ongoing_requests)
            )
            if self._whole and scaling:
                scaling = self._config.phi.autoscaling and scaling.model_copy(
                    update={
                        "min_replicas": max(1, scaling.min_replicas),
                        "max_replicas": self._config.phi.autoscaling.max_replicas,
                    }
                )
            least, most = (scaling.min_replicas, scaling.max_replicas) if scaling else (part.max_replicas,) * 2
            first = min(max(int(np.ceil(busy[name] / 0.7)), least), most)
            found[name] = Scaler(scaling, targets, max(starts.values()) if self._whole else starts[name], first)
        return found

    def _parts(self) -> dict[str, DeploymentConfig]:
        return {"vision": self._config.clip, "audio": self._config.whisper, "text": self._config.phi}

    def _counts(self, rates: NDArray[np.float64]) -> dict[str, float]:
        """Replicas that are paid for."""
        counts: dict[str, float] = {
            name: s.running + sum(n for _, n in s.starting) for name, s in self._scalers.items()
        }
        counts["ingress"] = self._n_ingress(float(rates.sum()))
        return counts

    def _n_ingress(self, rps: float) -> float:
        """As many as hold what the LM's replicas can, and compute no more than they should."""
        of_lm = self._scalers["text"].running * self._config.phi.max_ongoing_requests
        by_time = rps * self._times.ingress.seconds_per_request / _INGRESS_USE
        return float(max(1, np.ceil(by_time), np.ceil(of_lm / capacity(self._config))))

    @property
    def _inside(self) -> float:
        return sum(lanes.requests + lanes.callers.queued for lanes in (self._vision, self._audio, self._text))

    def _tick(self, now: float, tick_s: float, came: NDArray[np.int64], record: "_Record | None") -> None:
        """Let requests of each kind come, and time pass."""
        self._scale(now, tick_s)
        n_ingress = self._n_ingress(float(came.sum()) / tick_s)
        room = max(0.0, n_ingress * capacity(self._config) - self._inside)
        let_in = came if came.sum() <= room else self._chance.binomial(came, room / came.sum())
        entered = let_in.copy()
        told = self._telling(now, 0, int(entered[0])) if record else []
        perceived = int(entered[0])
        for kind, name, lanes in ((1, "vision", self._vision), (2, "audio", self._audio)):
            entered[kind] = self._admitted(int(let_in[kind]), lanes, self._parts()[name], n_ingress)
            some = self._telling(now, kind, int(entered[kind])) if record else []
            taken, done = lanes.advance(self._chance, now, tick_s, int(entered[kind]), some)
            told, perceived = told + taken, perceived + done
        n = self._admitted(perceived, self._text, self._config.phi, n_ingress)
        first = self._text.advance(self._chance, now, tick_s, n, self._prompt, told)
        if record:
            record.arrived += int(came.sum())
            record.refused += int((came - entered).sum()) + perceived - n
            record.told += first

    def _telling(self, now: float, kind: int, n: int) -> list[Told]:
        """Some of `n` requests that enter, with what they take whatever waits."""
        more = (self._prompts[kind] - self._prompt) * self._times.text.seconds_per_position
        seconds = self._times.ingress.seconds_per_request + float(more)
        some = min(n, _TOLD)
        return [Told(now, kind, n / some, seconds) for _ in range(some)]

    @staticmethod
    def _admitted(n: int, lanes: QueueLanes | DecodeLanes, part: DeploymentConfig, n_ingress: float) -> int:
        """How many of `n` are not refused: every ingress replica lets so many wait."""
        if part.max_queued_requests < 0:
            return n
        free = lanes.n_lanes * part.max_ongoing_requests - lanes.requests
        room = max(0.0, free) + part.max_queued_requests * n_ingress - lanes.callers.queued
        return int(min(n, max(0, room)))

    def _scale(self, now: float, tick_s: float) -> None:
        shape, config = self._shape, self._config
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
        if self._whole and config.phi.autoscaling:
            desired = dict.fromkeys(desired, max(desired.values()))
        for name, scaler in self._scalers.items():
            scaler.follow(now, desired[name])
        self._vision.resize(self._scalers["vision"].running)
        self._audio.resize(self._scalers["audio"].running)
        self._text.resize(self._scalers["text"].running)


class _Record:
    """What is kept of a run."""

    def __init__(self, seconds: float, n_ticks: int, tick_s: float):
        self._seconds, self._tick_s = seconds, tick_s
        self._every = max(1, n_ticks // _SHOWN)
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
            np.array([request.came for request in told]),
            np.array([request.kind for request in told], np.int64),
            np.array([request.weight for request in told]),
            self.arrived,
            self.refused,
        )


def with_bounds(config: ServeConfig, most: int) -> ServeConfig:
    """A config in which every deployment that scales may have so many replicas, for to ask how many are needed."""
    changed = {}
    for name in ("clip", "whisper", "phi"):
        part = getattr(config, name)
        if part.autoscaling:
            scaling = part.autoscaling.model_copy(update={"max_replicas": max(most, part.autoscaling.min_replicas)})
            changed[name] = part.model_copy(update={"autoscaling": scaling})
    return config.model_copy(update=changed)


def with_targets(config: ServeConfig, share: float) -> ServeConfig:
    """A config whose replicas hold so much of their targets: more replicas, shorter queues."""
    changed = {}
    for name in ("clip", "whisper", "phi"):
        part = getattr(config, name)
        if part.autoscaling:
            field = f"target_{part.autoscaling.unit}"
            scaling = part.autoscaling.model_copy(update={field: part.autoscaling.target * share})
            changed[name] = part.model_copy(update={"autoscaling": scaling})
    return config.model_copy(update=changed)
