"""Requests a second over time. In: a name, a peak rate, a mix. Out: rates of text, image and audio requests.

Does not know what a request costs.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mmllm_core.errors import ConfigError

KINDS = ("text", "image", "audio")
"""Of requests: text alone, with images, with sound; the order of every array by kind."""
TraceName = Literal["steady", "daily", "burst", "shift"]
SECONDS: dict[str, float] = {"steady": 1800.0, "daily": 86_400.0, "burst": 3600.0, "shift": 7200.0}
_NIGHT = 0.15
"""Share of the peak rate that is left in the quietest hour of `daily`."""
_ROUNDING = 0.0101  # thirds may be written as 0.33
_CALM = 0.25
"""Share of the peak rate outside the burst."""


@dataclass(frozen=True)
class Mix:
    """Shares of requests that are of a kind; they add up to 1."""

    text: float
    image: float
    audio: float

    @property
    def shares(self) -> NDArray[np.float64]:
        """(3,) in the order of `KINDS`."""
        return np.array([self.text, self.image, self.audio])


@dataclass(frozen=True)
class Trace:
    """A load.

    `steady`: the peak rate all the time. `daily`: a sine over the time, from 15% of the peak to the peak and back.
    `burst`: a quarter of the peak, and the whole of it during the third fifth of the time. `shift`: the peak rate all
    the time; a third of the way on, images and sound change their shares within a tenth of the time.
    """

    name: TraceName
    peak_rps: float
    mix: Mix
    seconds: float

    def rates(self, at: NDArray[np.floating]) -> NDArray[np.float64]:
        """Requests a second of each kind.

        Args:
            at: (n,) seconds since the beginning; times before it count as the beginning.

        Returns:
            (n, 3) in the order of `KINDS`.
        """
        done = np.clip(at / self.seconds, 0, 1)
        shares = np.broadcast_to(self.mix.shares, (len(at), 3))
        level = np.ones(len(at))
        if self.name == "daily":
            level = _NIGHT + (1 - _NIGHT) * (1 - np.cos(2 * np.pi * done)) / 2
        elif self.name == "burst":
            level = np.where((done >= 0.4) & (done < 0.6), 1.0, _CALM)
        elif self.name == "shift":
            moved = np.clip((done - 1 / 3) / 0.1, 0, 1)[:, None]  # (n, 1)
            shares = (1 - moved) * shares + moved * shares[:, [0, 2, 1]]
        return self.peak_rps * level[:, None] * shares


def trace_of(name: str, peak_rps: float, mix: Mix, seconds: float | None = None) -> Trace:
    """A trace by name.

    Args:
        seconds: that it lasts; as long as such a one usually does if None.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in get_args(TraceName):
        raise ConfigError(f"--trace {name}: choose one of {', '.join(get_args(TraceName))}")
    return Trace(name, peak_rps, mix, seconds or SECONDS[name])  # type: ignore[arg-type]


def parse_mix(said: str) -> Mix:
    """`text=0.6,image=0.3,audio=0.1`; what is not named is 0.

    Raises:
        ConfigError: a name or number that cannot be, a name twice, or shares that do not add up to 1.
    """
    named: dict[str, float] = {}
    for part in said.split(","):
        kind, given, value = part.strip().partition("=")
        try:
            if kind in named or kind not in KINDS or not given or not 0 <= (share := float(value)) <= 1:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"--mix {said}: '{part}' is not a share of requests; write text=0.6,image=0.3,audio=0.1, each name "
                "once and each share from 0 to 1"
            ) from None
        named[kind] = share
    total = sum(named.values())
    if abs(total - 1) > _ROUNDING:
        least = f", and {rest[0]}={1 - total:.4g} would be missing" if (rest := _unnamed(named)) and total < 1 else ""
        raise ConfigError(f"--mix {said}: shares add up to {total:.4g}{least}; make it 1")
    return Mix(*(named.get(kind, 0.0) / total for kind in KINDS))


def _unnamed(named: dict[str, float]) -> list[str]:
    return [kind for kind in KINDS if kind not in named]
