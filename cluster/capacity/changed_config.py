"""Serve configs with other bounds and targets than they have, to ask what would be. Does not know what is asked."""

from collections.abc import Callable, Mapping
from typing import Any

from cluster.modalities import FIELDS
from serve_apps.config import ServeConfig


def with_bounds(config: ServeConfig, most: int) -> ServeConfig:
    """A config in which every deployment that scales may have so many replicas, for to ask how many are needed."""
    return _with_scaling(config, lambda name, scaling: {"max_replicas": max(most, scaling.min_replicas)})


def with_targets(config: ServeConfig, shares: Mapping[str, float]) -> ServeConfig:
    """A config whose replicas hold a share of their targets, by modality: more replicas, shorter queues."""
    return _with_scaling(config, lambda name, scaling: {f"target_{scaling.unit}": scaling.target * shares[name]})


def _with_scaling(config: ServeConfig, change: Callable[[str, Any], dict[str, Any]]) -> ServeConfig:
    changed = {}
    for name, field in FIELDS.items():
        part = getattr(config, field)
        if part.autoscaling:
            scaling = part.autoscaling.model_copy(update=change(name, part.autoscaling))
            changed[field] = part.model_copy(update={"autoscaling": scaling})
    return config.model_copy(update=changed)
