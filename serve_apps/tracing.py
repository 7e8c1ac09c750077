"""OpenTelemetry traces of requests: ingress -> perceive -> vision and audio -> generate.

In: a W3C `traceparent`, of the caller or of the process that asks. Out: spans, sent to a collector where the config
names one and dropped otherwise. Parents are handed on as text, never by what is current: streams end in other contexts
than they began in. Spans hold names and counts, never what users send or are answered, and of errors their class alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry import trace as otel
from opentelemetry.trace import NoOpTracer, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mmllm_core.errors import ConfigError
from serve_apps.observability_config import ObservabilityConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_PROPAGATOR = TraceContextTextMapPropagator()
_SEND_EVERY_MS = 1_000


@dataclass(frozen=True)
class Trace:
    """A place in a trace below which spans are made.

    Args:
        traceparent: of the parent; "" begins a trace.
    """

    tracer: Tracer
    traceparent: str = ""

    @contextmanager
    def span(self, name: str, kind: SpanKind = SpanKind.INTERNAL) -> Iterator[tuple[Span, "Trace"]]:
        """A span as long as the block, and the place below it."""
        context = _PROPAGATOR.extract({"traceparent": self.traceparent})
        span = self.tracer.start_span(name, context=context, kind=kind)
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, otel.set_span_in_context(span))
        try:
            yield span, Trace(self.tracer, carrier.get("traceparent", ""))
        except BaseException as error:
            if not isinstance(error, GeneratorExit):
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            span.end()


def start_tracing(config: ObservabilityConfig, part: str) -> Tracer:
    """The tracer of a process; it does nothing where the config names no collector.

    Args:
        part: of the service, such as "vision".

    Raises:
        ConfigError: a collector is named, and what sends to it is not installed.
    """
    if config.otlp_endpoint is None:
        return NoOpTracer()
    return _provider(config, config.otlp_endpoint, part).get_tracer("mmllm")


def _provider(config: ObservabilityConfig, endpoint: str, part: str) -> "TracerProvider":
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            "observability.otlp_endpoint is set and nothing is installed that sends traces: pip install 'mmllm[otlp]'"
        ) from None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    resource = Resource.create({"service.name": f"mmllm-{part}", "service.namespace": "mmllm"})
    provider = TracerProvider(resource=resource, sampler=ParentBasedTraceIdRatio(config.trace_share))
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_SEND_EVERY_MS))
    return provider
