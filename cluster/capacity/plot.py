"""Ways to scale under one load, against time. In: their answers. Out: a PNG. Does not know how they came about."""

from pathlib import Path

from cluster.capacity.answer import Answer, saving
from cluster.capacity.prices import CPU
from cluster.capacity.simulation import PARTS
from cluster.capacity.traces import KINDS

_COLOURS = {"text": "#2a78d6", "image": "#e08e0b", "audio": "#3a9d5d", "vision": "#e08e0b"}


def plot(parts: Answer, whole: Answer, packed: Answer, file: Path) -> None:
    """Requests a second, replicas by modality, and what each way costs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (load, replicas, cost) = pyplot.subplots(3, sharex=True, figsize=(9, 8.5), layout="constrained")
    outcome = parts.outcome
    hours = outcome.at / 3600
    load.stackplot(hours, outcome.rates.T, labels=KINDS, colors=[_COLOURS[kind] for kind in KINDS], alpha=0.8)
    load.set_ylabel("requests/s")
    load.set_title("Load", loc="left", fontsize=10)
    for name in reversed(PARTS):
        replicas.plot(hours, outcome.replicas[name], color=_COLOURS[name], label=name)
    for one, line, label in ((whole, "-", "scaled whole"), (packed, ":", "scaled whole, models in turns")):
        replicas.plot(hours, one.outcome.replicas["text"], line, color="black", label=label)
    replicas.set_ylabel("replicas")
    replicas.set_title(
        "Replicas of each modality by itself, and of one deployment scaled whole", loc="left", fontsize=10
    )
    priced = all(one.dollars_per_hour is not None for one in (parts, whole, packed))
    for one, line, label in (
        (whole, "-", "scaled whole, each model with its own share"),
        (packed, ":", "scaled whole, models in turns"),
        (parts, "-", "each modality by itself"),
    ):
        amounts = {
            name: taken for name, taken in one.taken.items() if priced or (name == CPU) == (set(one.taken) == {CPU})
        }
        spent = sum(taken * (one.question.prices.of(name) or 0.0 if priced else 1.0) for name, taken in amounts.items())
        cost.plot(hours, spent, line, color="#2a78d6" if one is parts else "black", label=label)
    cost.set_ylabel("dollars an hour" if priced else "GPUs" if set(parts.taken) != {CPU} else "CPUs")
    said = [saving(parts, one) for one in (whole, packed)]
    cost.set_title(
        f"Saved: {said[0][0]:.0%} of {said[0][1]}; against models in turns {said[1][0]:.0%}", loc="left", fontsize=10
    )
    cost.set_xlabel("hours")
    for row in (load, replicas, cost):
        row.set_ylim(bottom=0)
        row.set_xlim(0, outcome.seconds / 3600)
        row.spines[["top", "right"]].set_visible(False)
        row.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
