"""Pictures of one run, or of several side by side.

In: `RunRecord`s and a theme. Out: PNGs, as bytes. What no run measured has no picture. Does not know pages or files.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train_jobs.run_record import RunRecord

Draw = Callable[[Any, Sequence["RunRecord"], "Theme"], bool]
"""Draws into matplotlib axes; False if there is nothing to draw."""

_SIZE = (5.6, 3.1)
"""Inches: 560 CSS pixels, so that text keeps its size where a picture is shown as wide as that, and can still be read
where a phone shows it at two thirds."""
_DPI = 160
_SMOOTHING = 0.9
_SPREAD = 20
"""Beyond this ratio values are drawn on a logarithmic scale."""


@dataclass(frozen=True)
class Theme:
    """Colours of a picture: the page's own."""

    background: str
    text: str
    grid: str
    faint: str
    runs: tuple[str, ...]
    """One a run, or one a series of a single run."""


LIGHT = Theme(
    "#ffffff", "#3b4252", "#e3e7ee", "#b8c1cf", ("#1f5fbf", "#d9730d", "#2f855a", "#9b3fb5", "#c0392b", "#5b6675")
)
DARK = Theme(
    "#161a22", "#c3cad6", "#2a303c", "#4d5666", ("#6ea8fe", "#f2a65a", "#68c69a", "#cf8be0", "#f08a80", "#9aa6b8")
)


def draw(name: str, records: Sequence["RunRecord"], theme: Theme) -> bytes | None:
    """A picture as PNG; None if no run measured what it shows.

    Args:
        name: a key of `PICTURES`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_style(theme)):
        figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
        try:
            if not PICTURES[name][1](axes, records, theme):
                return None
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(frameon=False, fontsize=9, ncols=3 if name == "accuracy" else 1)
            picture = io.BytesIO()
            figure.savefig(picture, dpi=_DPI)
            return picture.getvalue()
        finally:
            pyplot.close(figure)


def smoothed(values: Sequence[float], decay: float = _SMOOTHING) -> list[float]:
    """Exponential moving average without start-up bias (Adam's correction: arXiv:1412.6980, section 3)."""
    found, average = [], 0.0
    for i, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        found.append(average / (1 - decay**i))
    return found


def _style(theme: Theme) -> Any:
    return {
        "text.parse_math": False,  # a name with dollar signs is no formula
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.text,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "legend.labelcolor": theme.text,
        "font.size": 10,
        "lines.linewidth": 1.8,
    }


def _loss(axes: Any, records: Sequence["RunRecord"], theme: Theme) -> bool:
    drawn = False
    for record, colour in zip(records, _colours(records, theme), strict=True):
        steps, losses = record.series("loss")
        if not steps:
            continue
        drawn = True
        smooth_steps, smooth = record.series("loss_ema")
        if not smooth:
            smooth_steps, smooth = steps, smoothed(losses)
        axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1, label="each step" if len(records) == 1 else None)
        axes.plot(smooth_steps, smooth, color=colour, label="smoothed" if len(records) == 1 else record.name)
        for event in record.events:
            if event["event"] == "resumed" and "step" in event:
                axes.axvline(event["step"], color=theme.text, alpha=0.7, linestyle=":", linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss per supervised token")
    axes.set_ylim(bottom=0)
    return drawn


def _learning_rates(axes: Any, records: Sequence["RunRecord"], theme: Theme) -> bool:
    peaks = []
    single = len(records) == 1
    for record, colour in zip(records, _colours(records, theme), strict=True):
        for i, part in enumerate(("connector", "lm", "vision")):
            steps, rates = record.series(f"lr_{part}")
            if not any(rates):
                continue
            peaks.append(max(rates))
            axes.plot(
                steps,
                rates,
                color=theme.runs[i] if single else colour,
                linestyle=("-", "--", ":")[i],
                label=part if single else f"{record.name}: {part}",
            )
    axes.set(xlabel="step", ylabel="learning rate")
    if peaks and max(peaks) > _SPREAD * min(peaks):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(peaks) / 100)
    elif peaks:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return bool(peaks)


def _lines(field: str, label: str, scale: float = 1.0) -> Draw:
    """A line a run, of one measured value."""

    def drawing(axes: Any, records: Sequence["RunRecord"], theme: Theme) -> bool:
        largest, typical = 0.0, []
        for record, colour in zip(records, _colours(records, theme), strict=True):
            steps, values = record.series(field)
            if not steps:
                continue
            largest = max(largest, *values)
            typical.append(median(values))
            name = None if len(records) == 1 else record.name
            axes.plot(steps, [scale * value for value in values], color=colour, linewidth=1.4, label=name)
        axes.set(xlabel="step", ylabel=label)
        if typical and largest > _SPREAD * max(typical) > 0:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        return bool(typical)

    return drawing


def _accuracy(axes: Any, records: Sequence["RunRecord"], theme: Theme) -> bool:
    """Bars with 95% intervals: before and after of one run, or what several runs reached."""
    names = {"baseline": "always the commonest", "before": "before", "after": "after"}
    if len(records) == 1:
        taken = {names[when]: scores for when, scores in records[0].accuracy.items()}
        colours: tuple[str, ...] = (theme.grid, theme.faint, theme.runs[0])[-len(taken) :]
    else:
        taken = {record.name: record.accuracy["after"] for record in records if "after" in record.accuracy}
        colours = tuple(_colours(records, theme))
    if not taken:
        return False
    kinds = list(dict.fromkeys(kind for scores in taken.values() for kind in scores))
    width = 0.82 / len(taken)
    for i, (label, scores) in enumerate(taken.items()):
        asked = [(at, scores[kind]) for at, kind in enumerate(kinds) if kind in scores]
        places = [at + (i - (len(taken) - 1) / 2) * width for at, _ in asked]
        heights = [100 * score.accuracy for _, score in asked]
        below = [height - 100 * score.interval[0] for height, (_, score) in zip(heights, asked, strict=True)]
        above = [100 * score.interval[1] - height for height, (_, score) in zip(heights, asked, strict=True)]
        spread = None if label == names["baseline"] else (below, above)  # it is no sample of anything
        error = {"elinewidth": 1.2, "capsize": 2.5, "ecolor": theme.text}
        axes.bar(places, heights, width * 0.9, yerr=spread, error_kw=error, label=label, color=colours[i])
    axes.set(ylabel="right answers, %", ylim=(0, 118), yticks=range(0, 101, 20))
    axes.set_xticks(range(len(kinds)), kinds)
    axes.grid(visible=False, axis="x")
    return True


def _colours(records: Sequence["RunRecord"], theme: Theme) -> list[str]:
    return [theme.runs[i % len(theme.runs)] for i in range(len(records))]


PICTURES: dict[str, tuple[str, Draw]] = {
    "loss": ("Loss", _loss),
    "accuracy": ("Accuracy on held-out questions, with 95% intervals", _accuracy),
    "learning_rates": ("Learning rates", _learning_rates),
    "gradient_norm": ("Gradient norm, before clipping", _lines("grad_norm", "norm")),
    "tokens_per_second": ("Tokens a second, all workers", _lines("tokens_per_second", "tokens/s")),
    "mfu": ("Share of the devices' peak (MFU)", _lines("mfu", "%", scale=100)),
    "memory": ("Peak memory of the fullest worker", _lines("memory_gb", "GB")),
}
"""By name: a title, and what draws it."""
