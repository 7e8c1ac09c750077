"""Ways to scale under one load, against time. In: their answers. Out: a PNG. Does not know how they came about."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
    replicas.plot(hours, whole.outcome.replicas["text"], color="black", label="whole")
    replicas.plot(hours, packed.outcome.replicas["text"], ":", color="black", label="whole, models in turns")
    replicas.set_ylabel("replicas")
    replicas.set_title("Replicas", loc="left", fontsize=10)
    priced = all(one.dollars_per_hour is not None for one in (parts, whole, packed))
    cost.plot(hours, _spent(parts, priced), color=_COLOURS["text"], label="each modality by itself")
    cost.plot(hours, _spent(whole, priced), color="black", label="whole")
    cost.plot(hours, _spent(packed, priced), ":", color="black", label="whole, models in turns")
    cost.set_ylabel("dollars an hour" if priced else "GPUs" if set(parts.taken) != {CPU} else "CPUs")
    (share, unit), (in_turns, _) = saving(parts, whole), saving(parts, packed)
    cost.set_title(f"Saved: {share:.0%} of {unit} (models in turns: {in_turns:.0%})", loc="left", fontsize=10)
    cost.set_xlabel("hours")
    for row in (load, replicas, cost):
        row.set_ylim(bottom=0)
        row.set_xlim(0, outcome.seconds / 3600)
        row.spines[["top", "right"]].set_visible(False)
        row.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, frameon=False, fontsize=9, borderaxespad=0.1)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _spent(one: Answer, priced: bool) -> NDArray[np.float64]:
    """(n,) dollars an hour; where a price is missing GPUs, or CPUs if there are none."""
    prices = {name: one.question.prices.of(name) or 0.0 for name in one.taken}
    counted = prices if priced else dict.fromkeys(set(one.taken) - {CPU} or {CPU}, 1.0)
    return sum((one.taken[name] * price for name, price in counted.items()), np.zeros(len(one.outcome.at)))
