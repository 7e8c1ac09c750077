"""What is told of one request when it has ended: a line in the log, and the ingress' metrics.

A pure ASGI middleware before the door, so refused requests are told too. Routes write what they know into the request's
`RequestRecord`; it has no place for what users send or are answered. Labels and fields come from fixed sets: paths are
those of routes, never as they were sent. Does not know what routes do.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from opentelemetry.trace import NoOpTracer, Span, SpanKind
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmllm_core.engine.protocol import EngineChunk
from serve_apps.metrics import counter, gauge, histogram
from serve_apps.observability_config import ObservabilityConfig
from serve_apps.tracing import Trace, start_tracing

_log = logging.getLogger("ray.serve")
_OURS = frozenset({"/health", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass
class RequestRecord:
    """What is known of a request; times are of `time.perf_counter`."""

    began: float = field(default_factory=time.perf_counter)
    key: str = ""
    """Id of the caller's, where one was asked for."""
    model: str | None = None
    """The one that answers: never what was asked for and is not served."""
    stream: bool = False
    images: int = 0
    audio_clips: int = 0
    audio_seconds: float = 0.0
    perceived: float | None = None
    """When all was seen and heard."""
    first_token: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    token_gaps: list[float] = field(default_factory=list)
    """Seconds between tokens, a mean for each chunk."""
    error: str | None = None
    """The code of what went wrong."""
    trace: Trace = Trace(NoOpTracer())  # noqa: RUF009
    """Below the request's span."""
    _last: dict[int, tuple[float, int]] = field(default_factory=dict)  # by answer: when, and tokens until then

    def begin_answer(self) -> None:
        """Forget what came of an answer that is asked for again."""
        self.first_token, self.prompt_tokens, self.cached_tokens, self.completion_tokens = None, 0, 0, 0
        self.token_gaps.clear()
        self._last.clear()

    def note(self, chunk: EngineChunk) -> None:
        """Count a chunk of an answer as it comes."""
        now = time.perf_counter()
        before, counted = self._last.get(chunk.index, (None, 0))
        tokens = chunk.completion_tokens - counted
        if before is not None and tokens > 0:
            self.token_gaps.append((now - before) / tokens)
        if tokens > 0:
            self.first_token = self.first_token or now
            self._last[chunk.index] = now, chunk.completion_tokens
        self.prompt_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
        self.completion_tokens = sum(n for _, n in self._last.values())

    @property
    def modalities(self) -> str:
        """What the request held, as a label."""
        parts = [name for name, n in (("image", self.images), ("audio", self.audio_clips)) if n]
        return "+".join(["text", *parts])


def record_in(scope: Scope) -> RequestRecord:
    """The record of a request, which is nobody's where no middleware tells of it."""
    record: RequestRecord = scope.setdefault("mmllm.record", RequestRecord())
    return record


def record_of(request: Request) -> RequestRecord:
    """As `record_in`, for routes."""
    return record_in(request.scope)


@dataclass
class Ending:
    """How an answer went out."""

    status: int = 0
    """None was sent where it is 0."""
    is_whole: bool = False


class Recorded:
    """The middleware."""

    def __init__(self, app: ASGIApp, config: ObservabilityConfig):
        self._app = app
        self._as_json = config.logs == "json"  # fields need not be in the message then
        self._tracer = start_tracing(config, "ingress")
        self._open = 0
        self._requests, self._cancelled = counter("mmllm_requests"), counter("mmllm_requests_cancelled")
        self._held, self._replica = gauge("mmllm_requests_open"), gauge("mmllm_replicas", modality="ingress")
        self._held.set(0)
        self._replica.set(1)
        self._seconds, self._ttft = histogram("mmllm_request_seconds"), histogram("mmllm_ttft_seconds")
        self._gaps = histogram("mmllm_inter_token_seconds")
        self._tokens = {
            name: counter(f"mmllm_{name}") for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope["mmllm.record"] = RequestRecord()
        end = Ending()

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                end.status = message["status"]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                end.is_whole = True

        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._count_open(1)
        outside = Trace(self._tracer, Headers(scope=scope).get("traceparent", ""))
        with outside.span(method, SpanKind.SERVER) as (span, record.trace):
            try:
                await self._app(scope, receive, watch)
            finally:
                self._count_open(-1)
                self._tell(record, end, method, scope, span)

    def _count_open(self, change: int) -> None:
        self._open += change
        self._held.set(self._open)

    def _tell(self, record: RequestRecord, end: Ending, method: str, scope: Scope, span: Span) -> None:
        path, seconds, status = path_of(scope), time.perf_counter() - record.began, end.status or 499
        is_cancelled = not end.is_whole or status == 499
        if is_cancelled:
            self._cancelled.inc(1, {"path": path})
        self._requests.inc(1, {"path": path, "method": method, "status": str(status)})
        self._seconds.observe(seconds, {"path": path})
        if record.first_token is not None:
            self._ttft.observe(record.first_token - record.began, {"modalities": record.modalities})
        for gap in record.token_gaps:
            self._gaps.observe(gap)
        for name, metric in self._tokens.items():
            if amount := getattr(record, name):
                metric.inc(amount)
        fields: dict[str, Any] = {
            "method": method,
            "path": path,
            "status": status,
            "key": record.key or None,
            "model": record.model,
            "error": record.error,
            "cancelled": is_cancelled,
            "stream": record.stream,
            "seconds": round(seconds, 4),
            "perceive_seconds": _since(record.began, record.perceived),
            "ttft_seconds": _since(record.began, record.first_token),
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "images": record.images,
            "audio_clips": record.audio_clips,
            "audio_seconds": round(record.audio_seconds, 3),
        }
        told = {name: value for name, value in fields.items() if value or name in ("status", "seconds")}
        span.update_name(f"{method} {path}")
        span.set_attributes({"http.request.method": method, "http.route": path, "http.response.status_code": status})
        span.set_attributes({f"mmllm.{name}": value for name, value in told.items() if name not in ("method", "path")})
        if self._as_json:
            _log.info("request", extra={"ray_serve_extra_fields": told})
        else:
            _log.info("request %s", " ".join(f"{name}={value}" for name, value in told.items()))


def path_of(scope: Scope) -> str:
    """The path of the route that took a request; "page" for what the chat page has, "unknown" for all else."""
    path = str(getattr(scope.get("route"), "path", None) or "").replace(":path}", "}")
    if path in _OURS or path.startswith("/v1/"):
        return "unknown" if path == "/v1/{rest}" else path
    return "page" if "route" in scope else "unknown"


def _since(began: float, then: float | None) -> float | None:
    return None if then is None else round(then - began, 4)
