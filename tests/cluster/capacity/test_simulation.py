"""The simulation against one that follows every request, and what it must tell whatever the load."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.capacity.changed_config import with_bounds, with_targets
from cluster.capacity.outcome import Outcome, quantile
from cluster.capacity.service_times import ServiceTimes, load_service_times
from cluster.capacity.simulation import PARTS, Shape, Simulation, Way
from cluster.capacity.traces import KINDS, Mix, Trace
from serve_apps.config import ServeConfig
from serve_apps.config_files import load_serve_config
from tests.cluster.capacity.event_by_event import EventByEvent

MIX = Mix(0.5, 0.3, 0.2)
SHAPE = Shape(prompt_tokens=120, answer_tokens=60, images=1, audio_seconds=4.0)
QUICK = {"upscale_delay_s": 5, "downscale_delay_s": 20, "look_back_s": 10, "metrics_interval_s": 2}


@pytest.fixture(scope="module")
def times() -> ServiceTimes:
    """Of a slower machine than the packaged ones: no new measurement moves these tests."""
    values = load_service_times("embedded-cpu").model_dump()
    values["ingress"]["seconds_per_request"] = 0.0149
    values["vision"] |= {"start_seconds": 8.4, "seconds_per_batch": 0.0222, "seconds_per_image": 0.0053}
    values["audio"] |= {"start_seconds": 3.5, "seconds_per_clip": 0.0, "seconds_per_second": 0.125}
    values["text"] |= {"start_seconds": 18.0, "seconds_per_step": 0.0651, "seconds_per_answer": 0.0023}
    values["text"]["seconds_per_position"] = 0.00053
    return ServiceTimes.model_validate(values)


def fixed(**replicas: int) -> ServeConfig:
    changes: dict[str, Any] = {}
    for part, n in replicas.items():
        changes |= {f"{part}.autoscaling": None, f"{part}.num_replicas": n}
    return load_serve_config("embedded", changes)


def scaled(**more: Any) -> ServeConfig:
    changes = {
        f"{part}.autoscaling.{key}": value for part in ("clip", "whisper", "phi") for key, value in QUICK.items()
    }
    return with_bounds(load_serve_config("embedded", changes | more), 50)


def both(
    config: ServeConfig, times: ServiceTimes, trace: Trace, tick_s: float, way: Way = "apart", seed: int = 1
) -> tuple[Outcome, Any]:
    simulation = Simulation(config, times, trace, SHAPE, tick_s=tick_s, way=way, seed=seed)
    scalers = copy.deepcopy(simulation._scalers)
    exact = EventByEvent(config, times, trace, SHAPE, scalers, seed=seed, turns=way == "packed")
    exact.run()
    return simulation.run(), exact


def told(exact: EventByEvent, share: float, kind: int | None = None) -> float:
    return float(np.quantile([r.first for r in exact.done if kind in (None, r.kind)], share))


@pytest.mark.parametrize(
    ("rps", "replicas"),
    [(0.6, (1, 1, 1)), (2.5, (1, 1, 2)), (6.0, (1, 2, 4))],
    ids=["one of each, calm", "two LMs", "four LMs, busy"],
)
@pytest.mark.lengthy
def test_a_steady_load_is_told_as_event_by_event(
    rps: float, replicas: tuple[int, int, int], times: ServiceTimes
) -> None:
    config = fixed(clip=replicas[0], whisper=replicas[1], phi=replicas[2])
    found, exact = both(config, times, Trace("steady", rps, MIX, 1500.0), tick_s=0.25)
    for share in (0.5, 0.95):
        assert found.ttft(share) == pytest.approx(told(exact, share), rel=0.15)
        for kind, name in enumerate(KINDS):
            assert found.ttft(share, name) == pytest.approx(told(exact, share, kind), rel=0.25)


@pytest.mark.lengthy
def test_a_burst_brings_the_replicas_that_it_brings_event_by_event(times: ServiceTimes) -> None:
    config = with_targets(scaled(), dict.fromkeys(PARTS, 0.5))
    trace = Trace("burst", 8.0, MIX, 900.0)
    pairs = [both(config, times, trace, tick_s=0.25, seed=seed) for seed in range(3)]
    for name in PARTS:
        mean = np.mean([np.mean(exact.counts[name]) for _, exact in pairs])
        assert np.mean([found.replicas[name].mean() for found, _ in pairs]) == pytest.approx(mean, rel=0.15, abs=0.3)
    for share, rel in ((0.5, 0.2), (0.95, 0.35)):
        predicted = np.mean([found.ttft(share) for found, _ in pairs])
        assert predicted == pytest.approx(np.mean([told(exact, share) for _, exact in pairs]), rel=rel)


@pytest.mark.lengthy
def test_models_that_take_turns_are_told_as_event_by_event(times: ServiceTimes) -> None:
    trace = Trace("steady", 1.2, MIX, 1500.0)
    config = fixed(clip=2, whisper=2, phi=2)
    found, exact = both(config, times, trace, tick_s=0.25, way="packed")
    alone = Simulation(config, times, trace, SHAPE, tick_s=0.25).run()
    for share in (0.5, 0.95):
        assert found.ttft(share) == pytest.approx(told(exact, share), rel=0.15)
    assert (alone.ttft(0.95) or 0) < 0.75 * told(exact, 0.95)


@pytest.mark.lengthy
def test_ticks_much_longer_than_a_request_tell_the_same(times: ServiceTimes) -> None:
    trace = Trace("steady", 4.0, MIX, 800.0)
    config = fixed(clip=1, whisper=2, phi=4)
    fine, coarse = (Simulation(config, times, trace, SHAPE, tick_s=tick_s).run() for tick_s in (0.1, 2.0))
    assert coarse.ttft(0.5) == pytest.approx(fine.ttft(0.5), rel=0.15)
    assert coarse.ttft(0.95) == pytest.approx(fine.ttft(0.95), rel=0.25)


def test_more_than_can_be_answered_is_refused(times: ServiceTimes) -> None:
    found = Simulation(fixed(clip=1, whisper=1, phi=1), times, Trace("steady", 20.0, MIX, 120.0), SHAPE).run()
    assert 0.5 < found.refused / found.arrived < 1


def test_those_who_still_wait_when_a_trace_ends_are_told_with_all_that_they_waited(times: ServiceTimes) -> None:
    config = load_serve_config(
        "embedded", {"phi.autoscaling": None, "phi.max_queued_requests": -1, "ingress.max_ongoing_requests": 10_000}
    )
    found = Simulation(config, times, Trace("steady", 4.0, Mix(1.0, 0.0, 0.0), 120.0), SHAPE, tick_s=0.1).run()
    assert found.refused == 0
    assert found.weights.sum() == pytest.approx(found.arrived)
    assert (found.ttft(0.95) or 0) > 120


def test_long_ticks_refuse_nobody_whom_short_ones_take(times: ServiceTimes) -> None:
    quick = times.text.model_copy(update={"seconds_per_step": 0.01, "seconds_per_answer": 0.0002})
    fast = times.model_copy(update={"text": quick})
    trace = Trace("steady", 35.0, Mix(1.0, 0.0, 0.0), 200.0)
    config = fixed(clip=1, whisper=1, phi=6)
    fine, coarse = (Simulation(config, fast, trace, SHAPE, tick_s=tick_s).run() for tick_s in (0.1, 2.0))
    assert fine.refused == coarse.refused == 0
    assert coarse.ttft(0.95) == pytest.approx(fine.ttft(0.95), rel=0.25)


def test_a_request_that_comes_to_no_replica_waits_for_a_start(times: ServiceTimes) -> None:
    config = scaled(**{"clip.autoscaling.min_replicas": 0, "clip.autoscaling.downscale_delay_s": 5})
    trace = Trace("steady", 0.05, Mix(0.0, 1.0, 0.0), 1000.0)
    found = Simulation(config, times, trace, SHAPE, tick_s=0.25).run()
    assert found.replicas["vision"].min() == 0
    assert (found.ttft(0.95) or 0) > times.vision.start_seconds
    warm = Simulation(scaled(), times, trace, SHAPE, tick_s=0.25).run()
    assert (warm.ttft(0.95) or 0) < times.vision.start_seconds


def test_scaled_whole_every_modality_has_as_many_replicas(times: ServiceTimes) -> None:
    trace = Trace("steady", 6.0, MIX, 200.0)
    whole = Simulation(scaled(), times, trace, SHAPE, way="whole", tick_s=0.2).run()
    alone = Simulation(scaled(), times, trace, SHAPE, tick_s=0.2).run()
    assert np.array_equal(whole.replicas["vision"], whole.replicas["text"])
    assert whole.replicas["vision"].mean() > alone.replicas["vision"].mean()


def test_one_seed_tells_the_same_twice(times: ServiceTimes) -> None:
    trace = Trace("steady", 2.0, MIX, 60.0)
    one, two = (Simulation(fixed(clip=1, whisper=1, phi=1), times, trace, SHAPE, seed=3).run() for _ in range(2))
    assert np.array_equal(one.first_s, two.first_s)
    other = Simulation(fixed(clip=1, whisper=1, phi=1), times, trace, replace(SHAPE, answer_tokens=61), seed=4).run()
    assert not np.array_equal(one.first_s, other.first_s)


def test_a_quantile_goes_by_weight() -> None:
    assert quantile(np.array([3.0, 1.0, 2.0]), np.array([1.0, 8.0, 1.0]), 0.5) == 1
    assert quantile(np.array([3.0, 1.0, 2.0]), np.array([1.0, 8.0, 1.0]), 0.95) == 3
    assert quantile(np.zeros(0), np.zeros(0), 0.5) is None
