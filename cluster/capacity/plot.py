"""Two ways to scale under one load, against time. In: their answers. Out: a PNG. Does not know how they came about."""

from pathlib import Path

from cluster.capacity.answer import Answer, saving
from cluster.capacity.simulation import PARTS
from cluster.capacity.traces import KINDS


def plot(parts: Answer, whole: Answer, file: Path) -> None:
    """Requests a second, replicas by modality, and what both ways cost."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (load, replicas, cost) = pyplot.subplots(3, sharex=True, figsize=(9, 8), layout="constrained")
    outcome = parts.outcome
    hours = outcome.at / 3600
    load.stackplot(hours, outcome.rates.T, labels=KINDS, colors=["#2a78d6", "#e08e0b", "#3a9d5d"], alpha=0.8)
    load.set_ylabel("requests/s")
    load.legend(loc="upper left", ncols=3)
    for name, colour in zip(PARTS, ["#e08e0b", "#3a9d5d", "#2a78d6"], strict=True):
        replicas.plot(hours, outcome.replicas[name], color=colour, label=name)
    replicas.plot(whole.outcome.at / 3600, whole.outcome.replicas["text"], "--", color="black", label="scaled whole")
    replicas.set_ylabel("replicas")
    replicas.legend(loc="upper left", ncols=4)
    kind = "gpus" if parts.peak.gpus else "cpus"
    for found, colour, label in ((parts, "#2a78d6", "each modality by itself"), (whole, "black", "scaled whole")):
        taken = sum(
            counts * getattr(getattr(found.question.times, name).hardware, kind)
            for name, counts in found.outcome.replicas.items()
        )
        cost.fill_between(found.outcome.at / 3600, taken, color=colour, alpha=0.25, label=label)
    share, unit = saving(parts, whole)
    cost.set_ylabel(kind.upper().replace("S", "s"))
    cost.set_title(f"{share:.0%} fewer {unit}", loc="left", fontsize=10)
    cost.legend(loc="upper left", ncols=2)
    cost.set_xlabel("hours")
    for row in (load, replicas, cost):
        row.set_ylim(bottom=0)
        row.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
