"""How a learning rate moves over a run."""

import math

from mmllm_core.config import Recipe, Schedule


def rate_share(schedule: Schedule, step: int, warmup: int, total: int) -> float:
    """Share of the peak rate at a step: linear warm-up, then by the schedule's name.

    Args:
        schedule: `cosine` (half a cosine, arXiv:1608.03983) and `linear` fall to zero, `constant` stays.
        step: from 0 to `total` - 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    passed = (step - warmup) / max(1, total - warmup)
    match schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * passed))
        case "linear":
            return 1 - passed
        case "constant":
            return 1.0


def learning_rates(recipe: Recipe, step: int) -> dict[str, float]:
    """The rate of each part that a recipe trains, at a step counted from 0."""
    share = rate_share(recipe.schedule, step, recipe.warmup_steps, recipe.steps)
    return {part: getattr(recipe.learning_rates, part) * share for part in recipe.trained}
