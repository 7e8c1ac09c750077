"""Features and keys to store."""

import numpy as np

ENCODER = "0123456789abcdef"


def key(name: str, encoder: str = ENCODER) -> str:
    """A feature key as `ClipEncoder.key` makes it."""
    return f"{name}-{encoder}"


def features(n: int, seed: int = 0) -> np.ndarray:
    """Random features, float16 (n, 5, 8)."""
    return np.random.default_rng(seed).normal(size=(n, 5, 8)).astype(np.float16)
