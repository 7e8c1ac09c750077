"""Pictures of a run: the loss curve and accuracy before and after."""

from pathlib import Path
from typing import Any

from mmllm_core.evaluation.accuracy import Scores


def plot_loss(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot loss by step, raw and smoothed, to a PNG.

    Args:
        metrics: lines of a metrics log; those with `step` and `loss` are drawn.
    """
    pyplot = _pyplot()
    points = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if points:
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color="#b7c4d8", linewidth=1, label="each step")
        axes.plot(steps, _smoothed(losses), color="#1f4e99", linewidth=2, label="smoothed")
        axes.legend(frameon=False)
    axes.set(title=title, xlabel="step", ylabel="loss per supervised token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_accuracy(scores: dict[str, Scores], path: Path, title: str) -> None:
    """Plot grouped bars with 95% intervals to a PNG: a group for each kind, a bar for each entry of `scores`."""
    pyplot = _pyplot()
    kinds = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (label, by_kind) in enumerate(scores.items()):
        heights = [100 * by_kind[kind].accuracy for kind in kinds]
        intervals = [by_kind[kind].interval for kind in kinds]
        below = [height - 100 * low for height, (low, _) in zip(heights, intervals, strict=True)]
        above = [100 * high - height for height, (_, high) in zip(heights, intervals, strict=True)]
        positions = [k + (i - (len(scores) - 1) / 2) * width for k in range(len(kinds))]
        bars = axes.bar(
            positions,
            heights,
            width * 0.92,
            yerr=(below, above),
            error_kw={"elinewidth": 1.5, "capsize": 3, "ecolor": "#e08214"},
            label=label,
            color=("#c9ccd1", "#8fb3e0", "#1f4e99")[i % 3],
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=9, padding=1)
    axes.set(title=title, ylabel="right answers, % (95% interval)", ylim=(0, 110), yticks=range(0, 101, 20))
    axes.set_xticks(range(len(kinds)), kinds)
    axes.legend(frameon=False, loc="upper center", ncols=len(scores), bbox_to_anchor=(0.5, -0.08))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smoothed(values: tuple[float, ...], decay: float = 0.8) -> list[float]:
    """Exponential moving average without start-up bias."""
    smoothed, average = [], 0.0
    for i, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        smoothed.append(average / (1 - decay**i))
    return smoothed


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
