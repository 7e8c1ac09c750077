"""What a real service tells of itself after real requests: metrics, logs and traces, and never what was said."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from mmllm_core.bundle import Bundle
from serve_apps.api_keys import ApiKey, add_key
from tests.serve_apps.conftest import (
    Proxy,
    Service,
    audio_part,
    deploy,
    image_part,
    image_uri,
    own_serve,
    text_part,
    wav,
)

pytestmark = pytest.mark.slow

SECRET = "xylophone-4711"
"""Stands in everything that is sent, and shall stand in nothing that is told."""
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes spans as OpenTelemetry's collector does."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in sent.resource_spans:
                    part = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                    for scope in resource.scope_spans:
                        collector.spans += [(part, span) for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def serve_port(proxy: Proxy) -> Iterator[int]:
    """Whose metrics need not be waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        with own_serve(proxy=proxy) as port:
            yield port


@pytest.fixture(scope="module")
def watched(
    bundle: Bundle, serve_port: int, collector: Collector, speech: bytes, tmp_path_factory: pytest.TempPathFactory
) -> "Watched":
    file = tmp_path_factory.mktemp("access") / "keys.yaml"
    key = add_key(file, ApiKey(id="alice", sha256="0" * 64))
    overrides = {
        "http.port": serve_port,
        "ui": False,
        "access.keys_file": str(file),
        "observability.otlp_endpoint": collector.url,
        "phi.autoscaling.max_replicas": 1,
    }
    watched = Watched(deploy(bundle, "watched", "/", overrides), key, collector)
    watched.ask_of_everything(speech)
    return watched


class Watched:
    """A service of which everything was asked once."""

    def __init__(self, service: Service, key: str, collector: Collector):
        self.service, self.collector = service, collector
        self.headers = {"authorization": f"Bearer {key}"}
        self.usage: list[dict[str, int]] = []

    def ask_of_everything(self, speech: bytes) -> None:
        """Two texts (one streamed), a picture twice, another with a clip, refusals, and one who leaves."""
        traced = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "everything-1"}
        red = image_part(image_uri())
        self._chat([text_part(SECRET)], max_tokens=12)
        self._chat([text_part(SECRET)], max_tokens=12, stream=True, stream_options={"include_usage": True})
        self._chat([red, text_part(SECRET)])
        self._chat([red, text_part(SECRET)])
        self._chat([image_part(image_uri("blue")), audio_part(speech, "mp3"), text_part(SECRET)], traced)
        refused = [audio_part(wav(np.zeros(16_000)))]
        assert self._post(self.service.body(refused, user=SECRET)).status_code == 400
        assert self._post(self.service.body("Hi", model=SECRET)).status_code == 404
        assert self._post(self.service.body("Hi") | {SECRET: 1}).status_code == 400
        assert self._post(b'{"%s' % SECRET.encode()).status_code == 400
        assert httpx.get(f"{self.service.base_url}/v1/{SECRET}", headers=self.headers).status_code == 404
        assert httpx.get(f"{self.service.base_url}/v1/models").status_code == 401
        url = f"{self.service.base_url}/v1/chat/completions"
        endless = self.service.body(SECRET, max_tokens=1500, stream=True)
        with httpx.stream("POST", url, headers=self.headers, json=endless) as reply:
            next(reply.iter_lines())

    def _post(self, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"{self.service.base_url}/v1/chat/completions"
        return httpx.post(url, content=content, headers=self.headers | (headers or {}), timeout=60)

    def _chat(self, content: Any, headers: dict[str, str] | None = None, **fields: Any) -> None:
        reply = self._post(self.service.body(content, temperature=0, **fields), headers)
        assert reply.status_code == 200, reply.text
        if fields.get("stream"):
            events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
            self.usage.append(events[-1]["usage"])
        else:
            self.usage.append(reply.json()["usage"])

    def samples(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """What `/metrics` says: sums over replicas, by name and by our own labels."""
        page = httpx.get(f"{self.service.base_url}/metrics", headers=self.headers, timeout=30)
        assert page.headers["content-type"].startswith("text/plain")
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(lambda: defaultdict(float))
        for family in text_string_to_metric_families(page.text):
            for sample in family.samples:
                ours = {"path", "method", "status", "modalities", "modality", "unit", "tier", "le"}
                labels = tuple(sorted((key, value) for key, value in sample.labels.items() if key in ours))
                found[sample.name][labels] += sample.value
        return found

    def settled(self, name: str, labels: dict[str, str], value: float) -> dict[str, Any]:
        """`samples`, when one of them has reached what it should, or after long enough."""
        until = time.monotonic() + 40
        while (samples := self.samples())[name][tuple(sorted(labels.items()))] != value and time.monotonic() < until:
            time.sleep(0.5)
        return samples

    def logs(self) -> dict[str, list[dict[str, Any]]]:
        """The JSON lines of each replica's log, by deployment."""
        import ray

        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
        for file in folder.glob("replica_watched_*.log"):
            for line in file.read_text(encoding="utf-8").splitlines():
                found[file.name.split("_")[2]].append(json.loads(line))
        return found


CHAT = {"path": "/v1/chat/completions", "method": "POST"}


def test_metrics_are_those_of_the_requests_that_were_made(watched: Watched) -> None:
    watched.settled("ray_mmllm_requests_cancelled_total", {"path": CHAT["path"]}, 1)
    samples = watched.settled("ray_mmllm_requests_total", CHAT | {"status": "200"}, 6)

    def of(name: str, **labels: str) -> float:
        return float(samples[f"ray_mmllm_{name}"][tuple(sorted(labels.items()))])

    assert of("requests_total", **CHAT, status="200") == 6
    assert of("requests_total", **CHAT, status="400") == 3
    assert of("requests_total", **CHAT, status="404") == 1
    assert of("requests_total", path="unknown", method="GET", status="404") == 1
    assert of("requests_total", path="unknown", method="GET", status="401") == 1
    assert of("requests_cancelled_total", path=CHAT["path"]) == 1
    assert of("request_seconds_count", path=CHAT["path"]) == 10
    assert of("ttft_seconds_count", modalities="text") == 3
    assert of("ttft_seconds_count", modalities="text+image") == 2
    assert of("ttft_seconds_count", modalities="text+image+audio") == 1
    assert of("inter_token_seconds_count") >= 4
    *_, last = sorted(samples["ray_mmllm_inter_token_seconds_bucket"].items(), key=lambda item: item[1])
    assert last[1] == of("inter_token_seconds_count")
    assert of("prompt_tokens_total") >= sum(usage["prompt_tokens"] for usage in watched.usage)
    assert of("completion_tokens_total") >= sum(usage["completion_tokens"] for usage in watched.usage)
    assert of("images_total", tier="computed") == 2
    assert of("images_total", tier="ingress") == 1
    assert of("clip_batch_images_count") == 2
    assert 3 < of("audio_seconds_total") < 6  # the clip of three seconds, and one of silence
    assert of("audio_real_time_factor_count") == 2
    assert 0 < of("audio_compute_seconds_total") < 60
    assert 0 <= of("kv_use") <= 1
    for modality in ("vision", "audio", "text"):
        assert of("waiting", modality=modality) == 0
        assert of("running", modality=modality) == 0
    for modality in ("vision", "audio", "text", "ingress"):
        assert of("replicas", modality=modality) == 1


def test_every_metric_that_is_described_is_there(watched: Watched) -> None:
    from serve_apps.metrics import METRICS

    names = set(watched.samples())
    for name, spec in METRICS.items():
        exported = spec.exported(name)
        assert exported + ("_count" if spec.kind == "histogram" else "") in names, name


def test_a_request_is_one_line_at_the_ingress_and_keeps_its_id_through_all_hops(watched: Watched) -> None:
    logs = watched.logs()
    about = [line for line in logs["Assistant"] if line.get("request_id") == "everything-1"]
    [told] = [line for line in about if line["message"] == "request"]
    expected = {
        "message": "request",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "key": "alice",
        "model": "tiny",
        "images": 1,
        "audio_clips": 1,
        "completion_tokens": watched.usage[4]["completion_tokens"],
        "prompt_tokens": watched.usage[4]["prompt_tokens"],
    }
    assert {name: told.get(name) for name in expected} == expected
    assert 2 < told["audio_seconds"] < 5
    assert 0 < told["perceive_seconds"] <= told["ttft_seconds"] <= told["seconds"]
    for deployment, unit in (("ClipEncoder", "images"), ("Transcriber", "seconds"), ("PhiGenerator", "tokens")):
        [line] = [line for line in logs[deployment] if line.get("request_id") == "everything-1" and unit in line]
        assert line[unit] > 0
        assert 0 < line["seconds_held"] < told["seconds"]


def test_refusals_and_those_who_leave_are_told(watched: Watched) -> None:
    told = [line for line in watched.logs()["Assistant"] if line["message"] == "request"]
    errors = {(line["status"], line.get("error")) for line in told}
    assert {(404, "model_not_found"), (401, "invalid_api_key")} <= errors
    assert [line["stream"] for line in told if line.get("cancelled")] == [True]


def test_nothing_that_was_said_is_in_a_log(watched: Watched) -> None:
    import ray

    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    for file in (folder / "serve").rglob("replica_watched_*"):
        text = file.read_text(encoding="utf-8", errors="replace")
        assert SECRET not in text, file.name
        assert "never do it for free" not in text, file.name
        assert "Bearer" not in text


def test_a_trace_goes_through_every_part_below_the_callers(watched: Watched) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        spans = {span.name: (part, span) for part, span in watched.collector.spans if span.trace_id.hex() == TRACE}
        if len(spans) == 5:
            break
        time.sleep(0.2)
    root = spans["POST /v1/chat/completions"][1]
    assert root.parent_span_id.hex() == PARENT
    below = {name: span.parent_span_id for name, (_, span) in spans.items() if span is not root}
    perceive = spans["perceive"][1].span_id
    assert below == {"perceive": root.span_id, "vision": perceive, "audio": perceive, "generate": root.span_id}
    parts = {name: part for name, (part, _) in spans.items()}
    assert parts["vision"] == "mmllm-vision"
    assert parts["audio"] == "mmllm-audio"
    assert parts["generate"] == "mmllm-text"
    assert parts["perceive"] == "mmllm-ingress"
    assert spans["vision"][1].start_time_unix_nano < spans["audio"][1].end_time_unix_nano
    assert SECRET not in str(watched.collector.spans)


def test_top_prints_a_frame_of_it(watched: Watched) -> None:
    from typer.testing import CliRunner

    from cluster.cli import app

    key = watched.headers["authorization"][7:]
    base = ["top", "--once", "--every", "0.2", "--base-url", watched.service.base_url]
    ran = CliRunner().invoke(app, [*base, "--api-key", key])
    assert ran.exit_code == 0, ran.output
    rows = dict(line.split()[:2] for line in ran.output.splitlines() if len(line.split()) > 1)
    assert [rows[modality] for modality in ("text", "vision", "audio")] == ["1", "1", "1"]
    assert CliRunner().invoke(app, [*base, "--api-key", "wrong"]).exit_code != 0
