"""`mmllm top`: figures between two looks, and a frame of them."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.live_metrics import Look, frame, parse, quantile
from cluster.top_command import shown
from mmllm_core.errors import EnvironmentLack
from serve_apps.metrics import METRICS
from serve_apps.metrics_page import merged

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "mmllm.json"


def page(requests: int, tokens: int, images: int, fast: int, slow: int, replica: str = "a") -> str:
    mine = f'replica="{replica}",SessionName="s"'
    return f"""# HELP ray_mmllm_requests_total Requests.
# TYPE ray_mmllm_requests_total counter
ray_mmllm_requests_total{{{mine},path="/v1/x",status="200"}} {requests}
ray_mmllm_requests_total{{{mine},path="/v1/x",status="429"}} {requests // 10}
# HELP ray_mmllm_completion_tokens_total Tokens.
# TYPE ray_mmllm_completion_tokens_total counter
ray_mmllm_completion_tokens_total{{{mine}}} {tokens}
# HELP ray_mmllm_images_total Images.
# TYPE ray_mmllm_images_total counter
ray_mmllm_images_total{{{mine},tier="memory"}} {images * 3}
ray_mmllm_images_total{{{mine},tier="computed"}} {images}
# HELP ray_mmllm_replicas Replicas.
# TYPE ray_mmllm_replicas gauge
ray_mmllm_replicas{{{mine},modality="vision"}} 1
# HELP ray_mmllm_ttft_seconds TTFT.
# TYPE ray_mmllm_ttft_seconds histogram
ray_mmllm_ttft_seconds_bucket{{{mine},modalities="text",le="0.1"}} {fast}
ray_mmllm_ttft_seconds_bucket{{{mine},modalities="text",le="1.0"}} {fast + slow}
ray_mmllm_ttft_seconds_bucket{{{mine},modalities="text",le="+Inf"}} {fast + slow}
ray_mmllm_ttft_seconds_count{{{mine},modalities="text"}} {fast + slow}
ray_mmllm_ttft_seconds_sum{{{mine},modalities="text"}} 1
"""


def test_rates_are_those_between_two_looks_summed_over_replicas() -> None:
    before = Look(100.0, parse(page(10, 100, 5, 10, 0)))
    both = merged([page(40, 400, 15, 80, 10), page(20, 100, 5, 10, 10, replica="b")])
    now = frame(before, Look(110.0, parse(both)))
    assert now.requests == pytest.approx((60 - 10 + 6 - 1) / 10)
    assert now.failed == pytest.approx(0.5)
    vision = now.modalities["vision"]
    assert vision.replicas == 2
    assert vision.rate == pytest.approx((80 - 20) / 10)
    assert vision.cached == pytest.approx(0.75)
    assert now.modalities["text"].rate == pytest.approx(40)
    assert now.ttft == pytest.approx((0.0625, 0.775))  # of 80 within 0.1 s and 20 within 1 s
    assert now.modalities["text"].cached is None


def test_a_replica_that_counts_anew_gives_no_negative_rates() -> None:
    now = frame(Look(0.0, parse(page(1000, 5000, 100, 90, 9))), Look(10.0, parse(page(20, 50, 1, 1, 1))))
    assert now.requests == pytest.approx(2.2)
    assert now.ttft[0] is not None


def test_quantiles_are_prometheus_own() -> None:
    assert quantile(0.5, [1.0, 2.0, float("inf")], [0.0, 10.0, 10.0]) == pytest.approx(1.5)
    assert quantile(0.99, [1.0, float("inf")], [1.0, 10.0]) == pytest.approx(1.0)
    assert quantile(0.5, [1.0], [0.0]) is None
    assert quantile(0.5, [], []) is None


def test_a_frame_names_every_modality() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    look = Look(0.0, parse(page(1, 1, 1, 1, 1)))
    console.print(shown("http://here", frame(look, look)))
    text = console.export_text()
    for word in ("text", "vision", "audio", "requests/s", "first token", "waiting", "from cache"):
        assert word in text


def test_pages_of_nodes_are_merged_without_what_is_not_ours() -> None:
    other = '# HELP ray_tasks Tasks.\n# TYPE ray_tasks gauge\nray_tasks{State="R"} 3\nno name\n'
    text = merged([other + page(1, 1, 1, 1, 1), page(2, 1, 1, 1, 1, replica="b\\\\"), ""])
    assert "ray_tasks" not in text
    assert text.count("# TYPE ray_mmllm_requests_total counter") == 1
    assert parse(text)["ray_mmllm_requests_total"][(("path", "/v1/x"), ("status", "200"))] == 3


def test_nobody_there_is_one_readable_line() -> None:
    ran = CliRunner().invoke(app, ["top", "--once", "--base-url", "http://127.0.0.1:9"])
    assert isinstance(ran.exception, EnvironmentLack)


def test_every_metric_of_the_dashboard_is_one_of_the_service() -> None:
    from serve_apps.autoscaling import WorkPolicy

    targets = {"work": 1.0, "per_request": 1.0, "requests": 1}
    policy = WorkPolicy("text", "tokens", targets)
    known = {f"ray_mmllm_autoscaling_{name}" for name in policy._gauges}
    for name, spec in METRICS.items():
        endings = ("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",)
        known |= {spec.exported(name) + ending for ending in endings}
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    named: set[str] = set()
    for panel in dashboard["panels"]:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            found = set(re.findall(r"\bray_\w+", target["expr"]))
            assert found, target
            named |= found
    assert named <= known, named - known
    unseen = {name for name in METRICS if not any(f"ray_{name}" in shown for shown in named)}
    assert unseen == set()
