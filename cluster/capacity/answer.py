"""What a load takes: replicas, CPUs, GPUs, dollars, and seconds to the first token, per modality and scaled whole.

In: a load, a config, service times, prices. Out: an `Answer` of each way to scale. Where seconds are promised, replicas
hold less of their targets until they are kept. Does not know how an answer is shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from cluster.capacity.service_times import Hardware, ServiceTimes
from cluster.capacity.simulation import PARTS, Outcome, Shape, Simulation, with_bounds, with_targets
from cluster.capacity.traces import Trace
from mmllm_core.errors import ConfigError
from serve_apps.config import ServeConfig

TARGET_SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15)
PROMISED = 0.95
"""Share of requests that a promise is about."""


@dataclass(frozen=True)
class Prices:
    """Dollars an hour, as the user pays them; None where that is not known."""

    cpu: float | None = None
    gpu: float | None = None


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


@dataclass(frozen=True)
class Answer:
    """One way to scale, and what it takes."""

    question: Question
    outcome: Outcome
    target_share: float
    """Of the config's targets, that replicas were let hold."""

    @property
    def keeps(self) -> bool | None:
        """Whether what was promised is kept; None if nothing was. A refused request breaks it too."""
        promise, ttft = self.question.ttft_s, self.outcome.ttft(PROMISED)
        if promise is None:
            return None
        refused = self.outcome.refused / max(1, self.outcome.arrived)
        return (ttft or 0.0) <= promise and refused <= 1 - PROMISED

    @cached_property
    def hours(self) -> Hardware:
        """CPU hours and GPU hours of the whole trace."""
        return self._sum({name: float(counts.mean()) for name, counts in self.outcome.replicas.items()}, hours=True)

    @cached_property
    def peak(self) -> Hardware:
        """CPUs and GPUs when most are taken."""
        moments = zip(*self.outcome.replicas.values(), strict=True)
        taken = [self._sum(dict(zip(self.outcome.replicas, counts, strict=True))) for counts in moments]
        return Hardware(cpus=max(part.cpus for part in taken), gpus=max(part.gpus for part in taken))

    @property
    def dollars_per_hour(self) -> float | None:
        """On average over the trace; None where a price is missing of what is used."""
        hours, prices, total = self.hours, self.question.prices, 0.0
        for amount, price in ((hours.cpus, prices.cpu), (hours.gpus, prices.gpu)):
            if amount and price is None:
                return None
            total += amount * (price or 0.0)
        return total / (self.outcome.seconds / 3600)

    def _sum(self, replicas: Mapping[str, float], hours: bool = False) -> Hardware:
        scale = self.outcome.seconds / 3600 if hours else 1.0
        parts = [(count, getattr(self.question.times, name).hardware) for name, count in replicas.items()]
        return Hardware(
            cpus=sum(float(count) * part.cpus for count, part in parts) * scale,
            gpus=sum(float(count) * part.gpus for count, part in parts) * scale,
        )


def answer(question: Question, *, whole: bool = False) -> Answer:
    """Simulate, with replicas that hold ever less, until the promise is kept or there is no more to try.

    Args:
        whole: scale one deployment of all three models, as `Simulation`.

    Raises:
        ConfigError: the config scales some deployments and not others, and nothing whole can be made of that.
    """
    config = question.config
    scaled = [part.autoscaling is not None for part in (config.clip, config.whisper, config.phi)]
    if whole and len(set(scaled)) > 1:
        raise ConfigError(
            f"serve config '{config.name}': {', '.join(PARTS)} must all have autoscaling, or none, to be compared with "
            "one deployment that is scaled whole"
        )
    for share in TARGET_SHARES:
        changed = with_targets(with_bounds(config, question.max_replicas), share)
        outcome = Simulation(changed, question.times, question.trace, question.shape, whole=whole).run()
        found = Answer(question, outcome, share)
        if found.keeps is not False or not any(scaled):
            break
    return found


def saving(parts: Answer, whole: Answer) -> tuple[float, str]:
    """Share of the whole's cost that scaling by modality saves, and of what: dollars, GPU hours or CPU hours."""
    if parts.dollars_per_hour is not None and whole.dollars_per_hour:
        return 1 - parts.dollars_per_hour / whole.dollars_per_hour, "dollars"
    if whole.hours.gpus:
        return 1 - parts.hours.gpus / whole.hours.gpus, "GPU hours"
    return 1 - parts.hours.cpus / whole.hours.cpus, "CPU hours"
