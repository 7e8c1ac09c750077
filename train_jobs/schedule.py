"""How a learning rate moves over a run."""

import math


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Share of the peak rate at a step: linear warm-up, then half a cosine down to zero.

    Args:
        step: from 0 to `total` - 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
