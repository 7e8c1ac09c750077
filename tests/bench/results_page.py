"""`RESULTS.md`: every target with its measured value, met or not, and where and when it was measured.

In: benches, kept records, and how each bench last ended. Out: Markdown. Pure: reads and runs nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.bench.records import Record
from tests.bench.registry import Bench, Figure

AREAS = ("Training", "Data and features", "Decoding", "Serving", "Scaling and faults", "Commands", "GPU")
BUSY = 0.2
"""Share of a machine that other work may take before figures are marked."""
PLOTS = ("serving.png", "engines.png", "autoscaling.png")
Verdict = Literal["met", "missed", "not measured", "not judged", ""]


@dataclass(frozen=True)
class Outcome:
    """How a bench ended when it was last asked for."""

    status: Literal["measured", "failed", "left out"]
    day: str
    mode: str
    commit: str | None = None
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Row:
    """A figure and what was measured of it last."""

    bench: Bench
    figure: Figure
    record: Record | None

    @property
    def value(self) -> float | None:
        """None if it was never measured."""
        return None if self.record is None else self.record.figures[self.figure.path]

    @property
    def verdict(self) -> Verdict:
        """Of its target, if it has one."""
        target = self.figure.target
        if target is None:
            return ""
        if self.value is None or self.record is None:
            return "not measured"
        if not target.applies_to(self.record.machine.get("gpu")):
            return "not judged"
        return "met" if target.met(self.value) else "missed"


def rows_of(benches: Iterable[Bench], records: Sequence[Record]) -> list[Row]:
    """Every figure with the newest record that has it."""
    oldest_first = sorted(records, key=lambda record: record.order)

    def newest(bench: Bench, figure: Figure) -> Record | None:
        having = [r for r in oldest_first if r.bench == bench.name and figure.path in r.figures]
        return having[-1] if having else None

    return [Row(bench, figure, newest(bench, figure)) for bench in benches for figure in bench.figures]


def render(benches: Sequence[Bench], records: Sequence[Record], outcomes: Mapping[str, Outcome]) -> str:
    """The whole page."""
    rows = rows_of(benches, records)
    machines = _machines(rows)
    lines = [
        "# Results",
        "",
        "Written by `make bench` from the records under `tests/bench/results/`; do not edit it. "
        "[CONTRIBUTING.md](CONTRIBUTING.md) says how to run it.",
        "",
        *_summary(rows),
    ]
    for area in AREAS:
        lines += ["", f"## {area}", "", *_area([row for row in rows if row.bench.area == area], machines, outcomes)]
    lines += ["", "## Machines", "", *(f"- **{letter}**: {text}" for text, letter in machines.items())]
    lines += ["", "## How each bench last ended", "", *_endings(benches, outcomes)]
    lines += ["", "## Pictures", "", *(f"![{name.removesuffix('.png')}](docs/{name})" for name in PLOTS)]
    return "\n".join(lines) + "\n"


def _summary(rows: Sequence[Row]) -> list[str]:
    judged = [row for row in rows if row.figure.target]
    counts = {verdict: [row for row in judged if row.verdict == verdict] for verdict in ("met", "missed")}
    open_ = [row for row in judged if row.verdict in ("not measured", "not judged")]
    lines = [
        f"Of {len(judged)} targets {len(counts['met'])} are met, {len(counts['missed'])} missed and {len(open_)} not "
        "measured where they hold. A figure is of the newest record that has it, so some are older than the last run.",
    ]
    if counts["missed"]:
        lines += ["", "Missed:", ""]
        lines += [
            f"- {row.figure.what}: {_shown(row)}, target {row.figure.format_target()}" for row in counts["missed"]
        ]
    if open_:
        lines += ["", "Not measured where they hold:", ""]
        lines += [f"- {row.figure.what}, target {row.figure.format_target()}" for row in open_]
    return lines


def _area(rows: Sequence[Row], machines: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> list[str]:
    lines = []
    if rows and rows[0].bench.area == "GPU" and all(row.value is None for row in rows):
        lines += ["Not yet measured: no GPU was at hand. `make bench-gpu` on a machine that has one fills this in.", ""]
    lines += ["| | measured | target | | machine, day, mode, commit |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = f"**{row.verdict}**" if row.verdict == "missed" else row.verdict
        where = _where(row, machines, outcomes)
        lines.append(f"| {row.figure.what} | {_shown(row)} | {row.figure.format_target()} | {verdict} | {where} |")
    notes = {row.bench.name: row.bench.note for row in rows if row.bench.note}
    if notes:
        lines += ["", *(f"- `{name}`: {note}" for name, note in notes.items())]
    return lines


def _shown(row: Row) -> str:
    return "not measured" if row.value is None else row.figure.format(row.value)


def _where(row: Row, machines: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> str:
    if row.record is None:
        return ""
    machine, record = machines[_machine(row.record)], row.record
    if record.mode == "earlier":
        found = f"{machine}, by {record.measured}, earlier"
    else:
        found = f"{machine}, {record.measured}, {record.mode}" + (
            f", {_commit(record.commit)}" if record.commit else ""
        )
    if (record.busy_before or 0) > BUSY:
        found += f"; other work took {record.busy_before:.0%} of the machine"
    outcome = outcomes.get(row.bench.name)
    if outcome and outcome.status != "measured":
        found += f"; {outcome.status} when last asked for"
    return found


def _machines(rows: Sequence[Row]) -> dict[str, str]:
    """A letter for each machine that a shown figure comes from."""
    texts = dict.fromkeys(_machine(row.record) for row in rows if row.record)
    return {text: _letter(i) for i, text in enumerate(texts)}


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else f"A{i}"


def _machine(record: Record) -> str:
    """In words, versions included: other versions make it another machine."""
    if stated := record.machine.get("as_stated"):
        return f"{stated} (as stated with the figure then; versions were not kept)"
    machine = record.machine
    parts = [
        f"{machine['cores']} cores of {machine['cpu']}",
        f"{machine['memory_gb']} GB",
        f"bfloat16 by {machine['bfloat16']}" if machine.get("bfloat16") else "no bfloat16 instructions",
    ]
    if machine.get("gpu"):
        parts.append(str(machine["gpu"]))
    return ", ".join(parts) + "; " + ", ".join(f"{name} {version}" for name, version in record.versions.items())


def _endings(benches: Sequence[Bench], outcomes: Mapping[str, Outcome]) -> list[str]:
    lines = ["| bench | | seconds | day, mode, commit |", "|---|---|---|---|"]
    for bench in benches:
        found = outcomes.get(bench.name)
        title = f"`{bench.name}` (`python -m {bench.module}`)"
        if found is None:
            lines.append(f"| {title} | not run here yet | | |")
            continue
        why = f": {found.reason}" if found.reason else ""
        took = f"{found.seconds:.0f}" if found.seconds else ""
        when = f"{found.day}, {found.mode}" + (f", {_commit(found.commit)}" if found.commit else "")
        lines.append(f"| {title} | {found.status}{why} | {took} | {when} |")
    return lines


def _commit(commit: str) -> str:
    return commit.replace("+", " with changes")
