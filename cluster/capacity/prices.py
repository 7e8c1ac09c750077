"""Dollars an hour of hardware: a table with its sources and dates, or what the user pays.

In: a YAML file, or the packaged one. Out: dollars of amounts of hardware. Does not know who uses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pydantic import Field

from mmllm_core.config import StrictModel, load_config

PACKAGED = Path(__file__).parent / "tables" / "prices.yaml"
CPU = "cpu"


class Price(StrictModel):
    """One price as somebody publishes it."""

    dollars_per_hour: float = Field(ge=0)
    of: str
    """What is sold at that price, by whom and where."""
    source: str
    read: date
    """When it was so."""


class PriceTable(StrictModel):
    """Prices by hardware."""

    cpu: Price
    gpus: dict[str, Price] = Field(default_factory=dict)
    """By the name that service times give a GPU."""


@dataclass(frozen=True)
class Prices:
    """What hardware costs an hour."""

    table: PriceTable
    cpu: float | None = None
    """Instead of the table's."""
    gpu: float | None = None
    """Instead of the table's, for GPUs of any name."""

    def of(self, name: str) -> float | None:
        """Dollars an hour of a CPU core (`CPU`) or of a GPU by name; None if they are not known."""
        given, listed = (self.cpu, self.table.cpu) if name == CPU else (self.gpu, self.table.gpus.get(name))
        if given is not None or listed is None:
            return given
        return listed.dollars_per_hour

    def dollars(self, hours: Mapping[str, float]) -> float | None:
        """Dollars of hours of hardware by name; None if a price is not known."""
        total = 0.0
        for name, amount in hours.items():
            if (price := self.of(name)) is None:
                return None
            total += amount * price
        return total

    def explained(self, name: str) -> str:
        """A price and where it comes from, for people."""
        price = self.of(name)
        if price is None:
            known = ", ".join(self.table.gpus)
            return f"{name}: no price is known; give --gpu-price, or --prices FILE (the table has {known})"
        listed = self.table.cpu if name == CPU else self.table.gpus.get(name)
        given = self.cpu if name == CPU else self.gpu
        if given is not None or listed is None:
            return f"{name}: ${price:g} an hour, as given"
        return f"{name}: ${price:g} an hour ({listed.of}; {listed.source}, {listed.read})"


def load_prices(file: Path | None = None) -> PriceTable:
    """The packaged table, or one of the user's own.

    Raises:
        ConfigError: no such file, an unknown key, or a wrong value.
    """
    return load_config(PriceTable, file or PACKAGED)
