"""How a deployment scales: bounds, delays, and what a replica should hold in its modality's own unit.

Knows units and limits. Does not know Ray: `serve_apps.builder` turns it into Serve's own config, and
`serve_apps.autoscaling` decides by it.
"""

from dataclasses import replace
from typing import ClassVar

from pydantic import Field, model_validator

from mmllm_core.config import StrictModel
from serve_apps.autoscaling import Targets


class Autoscaling(StrictModel):
    """What every deployment that scales has."""

    min_replicas: int = Field(default=1, ge=0)
    """0 lets the deployment go while nothing asks for it; the request that then comes first waits for a start."""
    max_replicas: int = Field(gt=0)
    upscale_delay_s: float = Field(default=30.0, ge=0)
    """How long more replicas must be due before they start; from zero the first starts at once."""
    downscale_delay_s: float = Field(default=600.0, ge=0)
    """How long fewer must be enough before some end."""
    look_back_s: float = Field(default=30.0, gt=0)
    """Replicas follow the mean over so long."""
    metrics_interval_s: float = Field(default=10.0, gt=0)
    """How often replicas and callers report."""

    @model_validator(mode="after")
    def _ordered(self) -> "Autoscaling":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        if self.look_back_s <= self.metrics_interval_s:
            raise ValueError(
                f"look_back_s {self.look_back_s:g} is not above metrics_interval_s {self.metrics_interval_s:g}: "
                "nothing would be known between two reports"
            )
        return self


class RequestAutoscaling(Autoscaling):
    """Replicas follow requests: for the ingress, which only waits for others."""

    target_requests: float = Field(gt=0)
    """Requests that a replica should hold at a time."""


class WorkAutoscaling(Autoscaling):
    """Replicas follow work. A subclass names its unit and has `target_<unit>` and `<unit>_per_request`."""

    unit: ClassVar[str]

    tolerance: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target that must stay free when replicas end, so that their number does not swing.

    What is left should be below what a replica holds under a load that it just carries while nothing waits: of clips
    that are heard one at a time, one.
    """

    @property
    def target(self) -> float:
        """Work that a replica should hold at a time, in `unit`."""
        return float(getattr(self, f"target_{self.unit}"))

    @property
    def per_request(self) -> float:
        """Work of a request until some were measured, in `unit`."""
        return float(getattr(self, f"{self.unit}_per_request"))

    def targets(self, max_ongoing_requests: int) -> Targets:
        """What the policy goes by.

        Args:
            max_ongoing_requests: that a replica takes at a time.
        """
        return Targets(self.target, self.per_request, max_ongoing_requests, tolerance=self.tolerance)


class VisionAutoscaling(WorkAutoscaling):
    """Replicas follow images."""

    unit = "images"

    target_images: float = Field(gt=0)
    images_per_request: float = Field(default=1.0, gt=0)


class AudioAutoscaling(WorkAutoscaling):
    """Replicas follow seconds of sound, for one long clip is as much work as many short ones."""

    unit = "seconds"

    target_seconds: float = Field(gt=0)
    seconds_per_request: float = Field(default=15.0, gt=0)


class TextAutoscaling(WorkAutoscaling):
    """Replicas follow tokens of prompts and answers, and the memory for their keys and values."""

    unit = "tokens"

    min_replicas: int = Field(default=1, ge=1)
    """Every request needs the LM, and it takes longest to start."""
    target_tokens: float = Field(gt=0)
    tokens_per_request: float = Field(default=512.0, gt=0)
    max_kv_use: float = Field(default=0.8, gt=0, le=1)
    """Share of `kv_cache_bytes` that requests may hold before more replicas are due, whatever their tokens."""

    def targets(self, max_ongoing_requests: int) -> Targets:
        """As `WorkAutoscaling.targets`."""
        return replace(super().targets(max_ongoing_requests), kv_use=self.max_kv_use)
