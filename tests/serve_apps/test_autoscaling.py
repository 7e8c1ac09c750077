"""How many replicas the work asks for. Ray's types appear at the end only; no Ray runs here."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from mmllm_core.errors import ConfigError
from serve_apps.autoscaling import Observed, Report, Targets, decide, reports_of
from serve_apps.builder import serving_options
from serve_apps.config_files import load_serve_config

TARGETS = Targets(work=10, per_request=1, requests=8, tolerance=0.1)


def observed(*works: float, wanted: int | None = None, **other: Any) -> Observed:
    """Replicas that all reported, with so much work of one request each."""
    reports = tuple(Report(work, 1.0 if work else 0.0, 0.0) for work in works)
    seen = Observed(
        running=len(works),
        wanted=len(works) if wanted is None else wanted,
        queued=0.0,
        ongoing=0.0,
        reports=reports,
        min_replicas=0,
        max_replicas=100,
    )
    return replace(seen, **other)


@pytest.mark.parametrize(("work", "replicas"), [(1, 1), (10, 1), (10.1, 2), (20, 2), (20.1, 3), (95, 10)])
def test_replicas_step_up_with_work(work: float, replicas: int) -> None:
    assert decide(observed(work), TARGETS).replicas == replicas


def test_one_long_clip_weighs_as_much_as_many_short_ones() -> None:
    long, short = observed(60.0), observed(*[7.5] * 8, wanted=1)
    assert decide(long, TARGETS).replicas == decide(short, TARGETS).replicas == 6


def test_rounding_errors_of_means_cost_no_replica() -> None:
    assert decide(observed(0.1 * 3 / 0.3 * 20 + 1e-9, 0.0), TARGETS).replicas == 2


@pytest.mark.parametrize(("work", "replicas"), [(20.5, 3), (18.5, 3), (18.0, 2), (9.5, 2), (9.0, 1), (0.5, 1)])
def test_replicas_end_only_when_the_rest_have_room_to_spare(work: float, replicas: int) -> None:
    assert decide(observed(work, 0.0, 0.0), TARGETS).replicas == replicas


@given(st.floats(0, 1000), st.integers(0, 20))
def test_steady_work_never_swings_the_number(work: float, wanted: int) -> None:
    first = decide(observed(work, wanted=wanted), TARGETS).replicas
    assert decide(observed(work, wanted=first), TARGETS).replicas == first


def test_without_work_nothing_is_needed() -> None:
    assert decide(observed(0.0, 0.0), TARGETS).replicas == 0
    assert decide(observed(), TARGETS).replicas == 0


@pytest.mark.parametrize(("work", "replicas"), [(0.0, 2), (35.0, 4), (1e6, 5)])
def test_the_bounds_hold(work: float, replicas: int) -> None:
    assert decide(observed(work, min_replicas=2, max_replicas=5), TARGETS).replicas == replicas


def test_work_that_waits_at_the_callers_counts_as_recent_requests_did() -> None:
    seen = observed(0.0, queued=5.0)
    assert decide(seen, TARGETS).work == 5  # nothing was measured
    assert decide(replace(seen, remembered=8.0), TARGETS).work == 40
    measured = replace(seen, remembered=8.0, reports=(Report(2.0, 1.0, 0.0, per_request=4.0),))
    decision = decide(measured, TARGETS)
    assert (decision.work, decision.replicas, decision.per_request) == (22, 3, 4)


def test_what_was_measured_is_remembered_when_no_replica_is_left_to_tell() -> None:
    assert decide(observed(remembered=8.0), TARGETS).per_request == 8
    assert decide(observed(), TARGETS).per_request is None


def test_a_request_of_unknown_work_counts_as_recent_ones() -> None:
    seen = replace(observed(0.0), reports=(Report(10.0, 3.0, unweighed=2.0, per_request=7.0),))
    assert decide(seen, TARGETS).work == 24


def test_many_small_requests_fill_a_replica_too() -> None:
    seen = replace(observed(0.0), reports=(Report(0.8, 8.0, 0.0, per_request=0.1),), queued=9.0)
    assert decide(seen, TARGETS).work == pytest.approx(1.7)
    assert decide(seen, TARGETS).replicas == 3  # 17 requests, 8 to a replica


def test_a_replica_that_has_not_reported_is_credited_with_what_was_sent_to_it() -> None:
    seen = observed(8.0, running=2, wanted=2, ongoing=6.0, remembered=4.0)
    assert decide(seen, TARGETS).work == 8 + 5 * 4
    assert decide(seen, TARGETS).replicas == 3


def test_replicas_do_not_end_while_one_has_not_reported() -> None:
    assert decide(observed(0.0, running=2, wanted=2), TARGETS).replicas == 2
    assert decide(observed(0.0, 0.0), TARGETS).replicas == 0


def test_a_caller_that_still_counts_a_stream_that_ended_holds_no_replica() -> None:
    assert decide(observed(0.0, 0.0, ongoing=3.0), TARGETS).replicas == 0


def test_full_memory_for_keys_and_values_asks_for_replicas_whatever_the_tokens() -> None:
    seen = replace(observed(0.0, 0.0), reports=(Report(1.0, 1.0, 0.0, kv_use=0.9), Report(1.0, 1.0, 0.0, kv_use=0.9)))
    assert decide(seen, TARGETS).replicas == 1
    decision = decide(seen, replace(TARGETS, kv_use=0.8))
    assert (decision.replicas, decision.kv_use) == (3, pytest.approx(0.9))


def test_only_whole_reports_of_running_replicas_are_read() -> None:
    nan = float("nan")
    metrics = {
        "running_requests": {"a": 1.0, "b": 1.0},
        "work": {"a": 5.0, "gone": 9.0, "odd": nan, "half": 1.0},
        "requests": {"a": 2.0, "gone": 1.0, "odd": 1.0},
        "unweighed": {"a": 0.0, "gone": 0.0, "odd": 0.0},
        "work_per_request": {"a": 2.5},
    }
    assert reports_of(metrics, ["a", "b", "odd", "half"]) == (Report(5.0, 2.0, 0.0, 2.5),)
    assert reports_of(None, ["a"]) == ()


# What Serve makes of it.


def context(wanted: int, works: list[float], state: dict[str, Any] | None = None, **other: Any) -> AutoscalingContext:
    id_ = DeploymentID("Transcriber", "mmllm")
    replicas = [ReplicaID(str(i), id_) for i in range(len(works))]
    metrics = {
        "work": dict(zip(replicas, works, strict=True)),
        "requests": dict.fromkeys(replicas, 1.0),
        "unweighed": dict.fromkeys(replicas, 0.0),
    }
    fields: dict[str, Any] = {
        "deployment_id": id_,
        "deployment_name": id_.name,
        "app_name": id_.app_name,
        "current_num_replicas": len(works),
        "target_num_replicas": wanted,
        "running_replicas": replicas,
        "total_num_requests": float(len(works)),
        "total_queued_requests": 0.0,
        "aggregated_metrics": metrics,
        "raw_metrics": {},
        "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 4,
        "policy_state": state or {},
        "last_scale_up_time": None,
        "last_scale_down_time": None,
        "current_time": 0.0,
        "config": AutoscalingConfig(max_replicas=4),
    }
    return AutoscalingContext(**fields | other)


def of_audio(**changes: Any) -> AutoscalingConfig:
    """What Serve is told of the audio deployment."""
    overrides = {f"whisper.autoscaling.{key}": value for key, value in changes.items()}
    found: AutoscalingConfig = serving_options(load_serve_config("embedded", overrides).whisper, drain_s=9)[
        "autoscaling_config"
    ]
    return found


def test_serve_gets_the_policy_of_the_config() -> None:
    config = of_audio(target_seconds=20, max_replicas=4, upscale_delay_s=1, downscale_delay_s=2)
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (1, 2)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    replicas, state = policy(context(1, [50.0], {"work_per_request": 9.0}))
    assert replicas == 3
    assert state == {"work_per_request": 9.0}


def test_the_ingress_follows_requests_by_serves_own_policy() -> None:
    scaling = {"max_replicas": 3, "target_requests": 64}
    config = load_serve_config("embedded", {"ui": False, "ingress.num_replicas": None, "ingress.autoscaling": scaling})
    found = serving_options(config.ingress, drain_s=9)["autoscaling_config"]
    assert found.target_ongoing_requests == 64
    assert found.policy.is_default_policy_function()


def test_a_controller_without_mmllm_can_run_the_policy(tmp_path: Path) -> None:
    """Serve's controller is a process that nobody gave our packages to."""
    file = tmp_path / "policy"
    file.write_bytes(of_audio().policy.get_serialized_policy_def() or b"")
    script = f"""
import sys
from types import SimpleNamespace
sys.modules["serve_apps"] = sys.modules["mmllm_core"] = None  # importing them fails
from ray import cloudpickle
policy = cloudpickle.loads(open({str(file)!r}, "rb").read())
policy = policy("audio", "seconds", dict(work=10, per_request=1, requests=8))
metrics = {{"work": {{"a": 25.0}}, "requests": {{"a": 1.0}}, "unweighed": {{"a": 0.0}}}}
print(policy(SimpleNamespace(
    current_num_replicas=1, target_num_replicas=1, running_replicas=["a"], aggregated_metrics=metrics,
    total_queued_requests=0.0, total_num_requests=1.0, policy_state={{}}, app_name="mmllm",
    capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=9,
))[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "3", done.stderr


def test_the_policys_arguments_survive_a_config_file() -> None:
    config = of_audio()
    again = AutoscalingPolicy(
        policy_function="serve_apps.autoscaling:WorkPolicy", policy_kwargs=config.policy.policy_kwargs
    )
    assert again == config.policy


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"clip.autoscaling.target_images": 33}, "target_images 33 is above the 32 images"),
        ({"whisper.autoscaling.target_seconds": 121}, "target_seconds 121 is above the 120 seconds"),
        ({"phi.autoscaling.tokens_per_request": 100}, "above the 1600 tokens"),
        ({"phi.autoscaling.max_kv_use": 1.5}, "max_kv_use"),
        ({"phi.autoscaling.look_back_s": 5}, "not above metrics_interval_s"),
        ({"whisper.autoscaling.target_tokens": 5}, "target_tokens"),
        ({"clip.autoscaling.target_ongoing_requests": 5}, "target_ongoing_requests"),
        (
            {
                "ui": False,
                "ingress.num_replicas": None,
                "ingress.autoscaling": {"max_replicas": 2, "target_requests": 999},
            },
            "above max_ongoing_requests 256",
        ),
    ],
)
def test_targets_that_cannot_work_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_serve_config("embedded", overrides)


def test_a_replica_is_given_the_time_of_a_request_to_end() -> None:
    config = load_serve_config("embedded", {"limits.request_timeout_s": 77})
    for deployment in (config.clip, config.whisper, config.phi, config.ingress):
        assert serving_options(deployment, drain_s=config.limits.request_timeout_s)["graceful_shutdown_timeout_s"] == 77
