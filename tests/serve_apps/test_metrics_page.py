"""The metrics page goes without the nodes that do not answer."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from serve_apps.metrics_page import MetricsPage


class Exporter(BaseHTTPRequestHandler):
    """A node's metrics."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'# TYPE ray_mmllm_replicas gauge\nray_mmllm_replicas{modality="text"} 1\n')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Exporter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_node_that_does_not_answer_is_left_out(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "NodeManagerAddress": "127.0.0.1"}
    nodes = [node | {"MetricsExportPort": 1}, node | {"MetricsExportPort": port}]
    monkeypatch.setattr("serve_apps.metrics_page._nodes", lambda: nodes)
    text = asyncio.run(MetricsPage().text())
    assert [line for line in text.splitlines() if not line.startswith("#")] == ['ray_mmllm_replicas{modality="text"} 1']
