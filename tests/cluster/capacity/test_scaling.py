"""Simulated replicas follow the policy after the delays that Serve has."""

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_default_params
from ray.serve.config import AutoscalingConfig

from cluster.capacity.scaling import Delays, Held, Scaler
from serve_apps.autoscaling import Targets
from serve_apps.autoscaling_config import VisionAutoscaling

SCALING = VisionAutoscaling(
    min_replicas=0,
    max_replicas=9,
    target_images=4,
    upscale_delay_s=3,
    downscale_delay_s=6,
    look_back_s=2,
    metrics_interval_s=1,
)


class Context:
    """As much of Serve's context as its delays read."""

    def __init__(self, running: int, wanted: int):
        self.current_num_replicas, self.target_num_replicas = running, wanted
        self.config = AutoscalingConfig(min_replicas=0, max_replicas=20, upscale_delay_s=3, downscale_delay_s=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0.1, 4)), min_size=1, max_size=60))
def test_the_delays_are_serves_own(steps: list[tuple[int, float]]) -> None:
    from unittest.mock import patch

    ours, wanted, state, now = Delays(3, 6), 1, {}, 0.0
    for desired, seconds in steps:
        now += seconds
        with patch("ray.serve.autoscaling_policy.time.time", lambda: now):  # noqa: B023 (called at once)
            told, state = _apply_default_params(desired, Context(wanted, wanted), state)
        assert ours.apply(desired, wanted, wanted, now) == told
        wanted = told


def run(scaler: Scaler, works: list[float], begin: int = 0) -> list[int]:
    """Replicas that run, second by second, while they hold so many images."""
    running = []
    for second, work in enumerate(works, begin):
        scaler.follow(second, scaler.desired(second, 1.0, Held(work, work), 1.0))
        running.append(scaler.running)
    return running


def test_replicas_come_after_the_delay_and_a_start_and_go_after_theirs() -> None:
    scaler = Scaler(SCALING, SCALING.targets(8), start_s=5, wanted=1)
    up = run(scaler, [12.0] * 14)
    assert up[6] == 1
    assert up[-1] == 3
    down = run(scaler, [1.0] * 14, begin=14)
    assert down[4] == 3
    assert down[-1] == 1


def test_from_none_the_first_starts_at_once() -> None:
    scaler = Scaler(SCALING, SCALING.targets(8), start_s=2, wanted=0)
    for second in range(4):
        scaler.follow(second, scaler.desired(second, 1.0, Held(0, 0, queued=1), 1.0))
    assert scaler.running >= 1


def test_without_autoscaling_the_number_stays() -> None:
    assert run(Scaler(None, Targets(1, 1, 1), start_s=1, wanted=2), [50.0] * 5) == [2] * 5


def test_the_policy_and_the_simulation_need_no_ray() -> None:
    script = "import sys; sys.modules['ray'] = None\nimport serve_apps.autoscaling, cluster.capacity.scaling"
    subprocess.run([sys.executable, "-c", script], check=True)
