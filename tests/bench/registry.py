"""Every benchmark that `make bench` runs, what it needs and takes, and which of its figures are shown beside a target.

In: `benches.yaml`. Out: `Bench`es in the order in which they run. A bench is a program `python -m tests.bench.NAME`
whose last line on stdout is JSON; exit code 1 means that a target was missed, and its figures count all the same. Needs
PyYAML and nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

TABLE = Path(__file__).with_name("benches.yaml")
Sense = Literal["at least", "at most", "less than", "within"]
NEEDS = frozenset({"bundle", "gpu", "vllm", "speech", "clear_refs", "root"})
"""What benches may need (`tests.bench.run.lack`)."""
FORMATS = {
    "times": "{:.2f} x",
    "percent": "{:.1%}",
    "count": "{:,.0f}",
    "seconds": "{:.2f} s",
    "minutes": "{:.1f} min",
    "milliseconds": "{:.1f} ms",
}
_SENSES: dict[str, Sense] = {">=": "at least", "<=": "at most", "<": "less than", "1 +-": "within"}


@dataclass(frozen=True)
class Target:
    """What a figure should be."""

    sense: Sense
    value: float
    written: str
    """As the table has it."""
    only_on: str = ""
    """Holds only for a GPU whose name has this in it."""

    @classmethod
    def parse(cls, written: str, only_on: str = "") -> "Target":
        """Of `>= 2`, `<= 15`, `< 1` or `1 +- 0.15`.

        Raises:
            ValueError: it is none of these.
        """
        match = re.fullmatch(r"(>=|<=|<|1 \+-) (\S+)", written)
        if match is None:
            raise ValueError(f"'{written}' is no target: write '>= 2', '<= 15', '< 1' or '1 +- 0.15'")
        return cls(_SENSES[match[1]], float(match[2]), written, only_on)

    def met(self, figure: float) -> bool:
        """Whether a figure, as it was measured, is as it should be."""
        if self.sense == "at least":
            return figure >= self.value
        if self.sense == "at most":
            return figure <= self.value
        if self.sense == "less than":
            return figure < self.value
        return abs(figure - 1) <= self.value

    def applies_to(self, gpu: str | None) -> bool:
        """Whether a machine is one that the target was set for."""
        return not self.only_on or self.only_on in (gpu or "")


@dataclass(frozen=True)
class Figure:
    """A number in what a bench prints."""

    path: str
    """Keys and list indexes that lead to it, with dots between."""
    what: str
    """As the page names it."""
    shown: str
    """How it is formatted: one of `FORMATS`, or a format of its own."""
    target: Target | None = None

    def format(self, value: float) -> str:
        """For a reader."""
        return FORMATS.get(self.shown, self.shown).format(value)

    def format_target(self) -> str:
        """The target in the figure's unit; empty if there is none."""
        if self.target is None:
            return ""
        where = f" on {self.target.only_on}" if self.target.only_on else ""
        if self.target.sense == "within":
            return self.target.written.replace("+-", "±") + where
        sign = self.target.written.split()[0].replace(">=", "≥").replace("<=", "≤")
        return f"{sign} {self.format(self.target.value)}{where}"


@dataclass(frozen=True)
class Bench:
    """A program that measures."""

    name: str
    module: str
    area: str
    seconds: tuple[float, float]
    """That it takes on two cores, quick and full: guesses for the bar, and for what still fits."""
    figures: tuple[Figure, ...]
    quick: tuple[str, ...] | None = ()
    """Arguments in quick mode; None leaves it out. `{home}`, `{bundle}`, `{plots}` and `{vllm}` stand for paths."""
    full: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    if_there: Mapping[str, tuple[str, ...]] | None = None
    """Arguments besides, where a need is met without which it runs too."""
    note: str = ""
    """What one should know to read its figures."""

    def arguments(self, mode: str) -> tuple[str, ...] | None:
        """Of a mode."""
        return self.quick if mode == "quick" else self.full

    def expected(self, mode: str) -> float:
        """Seconds that it takes."""
        return self.seconds[mode != "quick"]


@cache
def benches() -> tuple[Bench, ...]:
    """All of the table."""
    return parse_benches(yaml.safe_load(TABLE.read_text(encoding="utf-8")))


def parse_benches(table: Mapping[str, Mapping[str, Any]]) -> tuple[Bench, ...]:
    """Benches by name.

    Raises:
        ValueError: an entry cannot be used as written; the message names it.
    """
    found = []
    for name, entry in table.items():
        try:
            bench = Bench(name, **{key: _value(key, value) for key, value in entry.items()})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{TABLE.name}: {name}: {error}") from error
        if unknown := {*bench.needs, *(bench.if_there or ())} - NEEDS:
            raise ValueError(
                f"{TABLE.name}: {name}: needs '{min(unknown)}', which is none of {', '.join(sorted(NEEDS))}"
            )
        found.append(bench)
    return tuple(found)


def by_name(names: Sequence[str]) -> list[Bench]:
    """Benches in the order of the table.

    Raises:
        ValueError: there is none of a name; the message names those that there are.
    """
    known = [bench.name for bench in benches()]
    if unknown := set(names) - set(known):
        raise ValueError(f"no bench is called '{min(unknown)}': choose of {', '.join(known)}")
    return [bench for bench in benches() if bench.name in names]


def _value(key: str, value: Any) -> Any:
    if key == "figures":
        return tuple(_figure(**each) for each in value)
    if key in ("quick", "full"):
        return value if value is None else tuple(str(value).split())
    if key == "if_there":
        return {need: tuple(str(arguments).split()) for need, arguments in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _figure(path: str, what: str, shown: str, target: str | None = None, only_on: str = "") -> Figure:
    return Figure(path, what, shown, None if target is None else Target.parse(target, only_on))
