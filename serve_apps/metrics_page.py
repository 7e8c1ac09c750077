"""`/metrics`: what every node of the cluster exports of this service, as one page for Prometheus.

In: the metrics port of each node, where Ray gathers what replicas count. Out: the exposition text of `ray_mmllm_*` and
of the few metrics of Serve's own that tell of queues. What a replica counted is there after Ray's report
interval, ten seconds by default. Where Prometheus scrapes the nodes itself, this page is not needed: names and labels
are the same. Without Ray the page is empty. Does not know what the metrics mean.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import httpx
from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.parser import text_string_to_metric_families

from serve_apps.ray_process import is_connected
from serve_apps.shared_answer import SharedAnswer

_log = logging.getLogger("ray.serve")

SERVE_METRICS = (
    "ray_serve_deployment_queued_queries",
    "ray_serve_replica_processing_queries",
    "ray_serve_num_ongoing_requests_at_replicas",
)
"""Serve's own that are passed on."""
REMEMBERED_S = 1.0
"""How long a page holds, so that many who ask cost no more than one."""
TIMEOUT_S = 5.0
"""That a node has to answer; one that does not is left out."""


class MetricsPage:
    """Gathers the page."""

    def __init__(self) -> None:
        self._shared = SharedAnswer(self._gather, REMEMBERED_S)

    async def text(self) -> str:
        """The page."""
        return await self._shared.get()

    async def _gather(self) -> str:
        nodes = await asyncio.to_thread(_nodes)
        urls = [
            f"http://{_bracketed(node['NodeManagerAddress'])}:{node['MetricsExportPort']}/metrics"
            for node in nodes
            if node["Alive"] and node["MetricsExportPort"] > 0
        ]
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
            pages = await asyncio.gather(*(_page(client, url) for url in urls))
        return await asyncio.to_thread(merged, pages)


def _nodes() -> list[dict[str, Any]]:
    if not is_connected():
        return []
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()
    return nodes


async def _page(client: httpx.AsyncClient, url: str) -> str:
    try:
        reply = await client.get(url)
        return reply.text if reply.is_success else ""
    except httpx.HTTPError as error:
        _log.warning("the metrics of a node are missing: %s: %s", url, type(error).__name__)
        return ""


def merged(pages: Iterable[str]) -> str:
    """Pages of nodes as one, each metric described once; what is not ours is left out."""
    described: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        for family in text_string_to_metric_families("\n".join(_our_lines(page)) + "\n"):
            # The parser takes `_total` from counters' names, and older exporters never wrote it.
            name = f"{family.name}_total" if family.type == "counter" else family.name
            described.setdefault(
                name, [f"# HELP {name} {_escaped(family.documentation)}", f"# TYPE {name} {family.type}"]
            )
            for sample in family.samples:
                labels = ",".join(f'{key}="{_escaped(value, quotes=True)}"' for key, value in sample.labels.items())
                samples.setdefault(name, []).append(f"{sample.name}{{{labels}}} {sample.value!r}")
    return "".join("\n".join([*described[name], *samples.get(name, [])]) + "\n" for name in sorted(described))


def _our_lines(page: str) -> Iterable[str]:
    wanted = ("ray_mmllm_", *SERVE_METRICS)
    for line in page.splitlines():
        name = line.split(" ", 3)[2] if line.startswith("# ") and line.count(" ") > 2 else line
        if name.startswith(wanted):
            yield line


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def add_metrics_route(app: FastAPI) -> None:
    """Serve the page at `/metrics`, behind the door as all routes are."""
    page = MetricsPage()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Show the service's metrics in Prometheus' text format."""
        return Response(await page.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
