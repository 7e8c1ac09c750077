"""What the service tells of itself: logs and traces. Metrics are always there. Does not know Ray."""

from typing import Annotated, Literal

from pydantic import Field

from mmllm_core.config import StrictModel


class ObservabilityConfig(StrictModel):
    """Logs and traces; neither ever holds what users send or are answered."""

    logs: Literal["json", "text"] = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """Collector of OpenTelemetry traces, such as `http://127.0.0.1:4318`; needs pip install 'mmllm[otlp]'."""
    trace_share: float = Field(default=1.0, ge=0, le=1)
    """Of requests that are traced, where the caller's `traceparent` does not say."""
