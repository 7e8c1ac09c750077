"""What a load takes: replicas, CPUs, GPUs, dollars, and seconds to the first token, of each way to scale.

In: a load, a config, service times, prices. Out: an `Answer`. Where seconds are promised, it is the cheapest of some
shares of the config's targets with which they are kept. Does not know how an answer is shown.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cluster.capacity.changed_config import with_bounds, with_targets
from cluster.capacity.outcome import Outcome, quantile
from cluster.capacity.prices import CPU, Prices
from cluster.capacity.service_times import Hardware, ServiceTimes
from cluster.capacity.simulation import PARTS, TICK_S, Shape, Simulation, Tell, Way
from cluster.capacity.traces import KINDS, Trace
from cluster.modalities import FIELDS
from mmllm_core.errors import ConfigError
from serve_apps.config import ServeConfig

TARGET_SHARES = (1.0, 0.5, 0.25, 0.12)
_OWN_TARGETS = dict.fromkeys(PARTS, 1.0)
SEARCH_TICKS = 2_000
"""Of a trace, while shares are looked for, or more where they would be longer than `SEARCH_TICK_S`; what is found is
then simulated as finely as anything."""
SEARCH_TICK_S = 2.0
SEARCH_DAY_S = 4_000.0
"""In which a day passes meanwhile: its rates change slowly beside all that replicas wait for, even so."""
_FINALS = 2
"""Of what is found, the best that are simulated in full, until one keeps the promise there too."""
PROMISED = 0.95
"""Share of requests that a promise is about."""


class Unreachable(ConfigError):
    """What is promised is not kept by any number of replicas."""


@dataclass(frozen=True)
class Question:
    """What is asked."""

    config: ServeConfig
    times: ServiceTimes
    trace: Trace
    shape: Shape
    prices: Prices
    ttft_s: float | None = None
    """Seconds to the first token that 95% of requests shall have."""
    max_replicas: int = 2_000
    """Of a deployment, instead of the config's own bounds."""

    @property
    def scaled(self) -> list[str]:
        """Modalities whose replicas follow the load."""
        return [name for name, field in FIELDS.items() if getattr(self.config, field).autoscaling]


@dataclass(frozen=True)
class Answer:
    """One way to scale, and what it takes."""

    question: Question
    way: Way
    outcome: Outcome
    target_shares: dict[str, float]
    """Of the config's targets, that replicas were let hold, by modality."""

    @property
    def keeps(self) -> bool | None:
        """Whether what was promised is kept; None if nothing was. A refused request does not keep it."""
        promise = self.question.ttft_s
        return None if promise is None else self.outcome.share_within(promise) >= PROMISED

    @property
    def capped(self) -> list[str]:
        """Modalities that had as many replicas as they may have, at some moment."""
        most = self.question.max_replicas
        return [name for name in self.question.scaled if self.outcome.replicas[name].max() > most - 0.5]

    @cached_property
    def taken(self) -> dict[str, NDArray[np.float64]]:
        """(n,) CPU cores (`CPU`), and GPUs by name, that are taken at the outcome's moments."""
        taken: dict[str, NDArray[np.float64]] = {}
        for part, hardware in replica_hardware(self.question.times, self.way).items():
            for name, amount in hardware.amounts.items():
                taken[name] = taken.get(name, 0.0) + self.outcome.replicas[part] * amount
        return taken

    @property
    def hours(self) -> dict[str, float]:
        """Of each kind of hardware, over the whole trace."""
        return {name: float(amounts.mean()) * self.outcome.seconds / 3600 for name, amounts in self.taken.items()}

    @property
    def peak(self) -> dict[str, float]:
        """Of each kind of hardware, when most of it is taken."""
        return {name: float(amounts.max()) for name, amounts in self.taken.items()}

    @property
    def dollars_per_hour(self) -> float | None:
        """On average over the trace; None where a price is missing of what is used."""
        total = self.question.prices.dollars(self.hours)
        return total if total is None else total / (self.outcome.seconds / 3600)


def replica_hardware(times: ServiceTimes, way: Way) -> dict[str, Hardware]:
    """What a replica of each part takes, and one of the ingress.

    All three models of a replica that packs them take what the largest does, which is counted as the LM's.
    """
    hardware = {name: getattr(times, name).hardware for name in (*PARTS, "ingress")}
    if way != "packed":
        return hardware
    models = [hardware[name] for name in PARTS]
    most = max(models, key=lambda one: one.gpus)
    together = Hardware(cpus=max(one.cpus for one in models), gpus=most.gpus, gpu=most.gpu)
    return hardware | {"vision": Hardware(), "audio": Hardware(), "text": together}


def answer(question: Question, way: Way = "apart", tell: Tell = lambda n: None) -> Answer:
    """Simulate by the config's own targets, or if seconds are promised by the cheapest with which they are kept.

    Args:
        tell: as `Simulation.run`; of about `expected_ticks`.

    Raises:
        ConfigError: as `require_answerable`.
    """
    require_answerable(question, way)
    if question.ttft_s is None or not question.scaled:
        return _simulated(question, way, _OWN_TARGETS, tell)
    best: Answer | None = None
    for shares in _cheapest(question, way, tell)[:_FINALS]:
        found = _simulated(question, way, shares, tell)
        best = found if best is None else min(best, found, key=_rank)
        if found.keeps:
            break
    assert best is not None
    return best


def expected_ticks(question: Question) -> int:
    """That are simulated for an answer, at most or nearly."""
    full = _simulation(question, "apart", _OWN_TARGETS).n_ticks
    if question.ttft_s is None or not question.scaled:
        return full
    tries = 1 + len(question.scaled) * (len(TARGET_SHARES) - 1)
    return full + tries * _simulation(_searched(question), "apart", _OWN_TARGETS, _search_tick_s(question)).n_ticks


def require_answerable(question: Question, way: Way) -> None:
    """See before anything is simulated whether it can be.

    Raises:
        ConfigError: the config scales some deployments and not others, and nothing whole can be made of that.
        Unreachable: requests that meet nobody already take longer than is promised.
    """
    if way != "apart" and question.scaled and len(question.scaled) < len(PARTS):
        raise ConfigError(
            f"serve config '{question.config.name}': {', '.join(FIELDS.values())} must all have autoscaling, or none, "
            "to be compared with one deployment that is scaled whole"
        )
    _require_reachable(question)


def saving(parts: Answer, whole: Answer) -> tuple[float, str]:
    """Share of the whole's cost that scaling by modality saves, below 0 if it costs more, and of what."""
    if parts.dollars_per_hour is not None and whole.dollars_per_hour:
        return 1 - parts.dollars_per_hour / whole.dollars_per_hour, "dollars"
    gpus = [sum(amount for name, amount in one.hours.items() if name != CPU) for one in (parts, whole)]
    if gpus[1]:
        return 1 - gpus[0] / gpus[1], "GPU hours"
    return 1 - parts.hours[CPU] / whole.hours[CPU], "CPU hours"


def alone_s(question: Question) -> dict[str, float]:
    """Seconds to the first token of a request of each kind that meets nobody."""
    simulation = Simulation(question.config, question.times, question.trace, question.shape)
    return dict(zip(KINDS, simulation.alone_s().tolist(), strict=True))


def _simulation(question: Question, way: Way, shares: dict[str, float], tick_s: float | None = None) -> Simulation:
    config = with_targets(with_bounds(question.config, question.max_replicas), shares)
    return Simulation(config, question.times, question.trace, question.shape, way=way, tick_s=tick_s)


def _simulated(
    question: Question, way: Way, shares: dict[str, float], tell: Tell, tick_s: float | None = None
) -> Answer:
    return Answer(question, way, _simulation(question, way, shares, tick_s).run(tell), shares)


def _searched(question: Question) -> Question:
    """What is asked while shares are looked for: a day passes sooner."""
    trace = question.trace
    seconds = min(trace.seconds, SEARCH_DAY_S) if trace.name == "daily" else trace.seconds
    return replace(question, trace=replace(trace, seconds=seconds))


def _search_tick_s(question: Question) -> float:
    return max(TICK_S, min(SEARCH_TICK_S, _searched(question).trace.seconds / SEARCH_TICKS))


def _cheapest(question: Question, way: Way, tell: Tell) -> list[dict[str, float]]:
    """Shares of the targets with which the promise is kept at the least cost, looked for modality by modality.

    Less of a target may be cheaper too: replicas that let much wait are ended when nothing waits, and then missed.

    Returns:
        All that were tried, the best first; the config's own targets alone, if they take more replicas than there may
        be and less of them would ask for more.
    """
    searched, tick_s = _searched(question), _search_tick_s(question)
    best = _simulated(searched, way, _OWN_TARGETS, tell, tick_s)
    if best.capped and not best.keeps:
        return [best.target_shares]
    all_tried = [best]
    for name in reversed(question.scaled):  # the LM decides most
        worse = 0
        for share in TARGET_SHARES[1:]:
            tried = _simulated(searched, way, best.target_shares | {name: share}, tell, tick_s)
            worse = 0 if _rank(tried) < _rank(best) else worse + 1
            all_tried.append(tried)
            best = min(best, tried, key=_rank)
            if worse == 2:
                break
    return [tried.target_shares for tried in sorted(all_tried, key=_rank)]


def _rank(found: Answer) -> tuple[float, float]:
    """By how much a promise is missed, then by cost."""
    missed = max(0.0, PROMISED - found.outcome.share_within(found.question.ttft_s or 0.0))
    cost = found.dollars_per_hour
    return missed, sum(found.hours.values()) if cost is None else cost


def _require_reachable(question: Question) -> None:
    if question.ttft_s is None:
        return
    alone = alone_s(question)
    least = quantile(np.array(list(alone.values())), question.trace.mix.shares, PROMISED) or 0.0
    if least > question.ttft_s:
        said = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in alone.items())
        raise Unreachable(
            f"--slo ttft={question.ttft_s:g}: no number of replicas keeps it, for a request that meets nobody has its "
            f"first token after: {said}. Promise {least * 1.2:.2g} s or more, or give service times of faster hardware "
            "(--times)"
        )
