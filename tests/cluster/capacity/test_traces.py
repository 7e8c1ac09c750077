"""Loads over time, and what is said of them on the command line."""

import numpy as np
import pytest

from cluster.capacity.traces import Mix, parse_mix, trace_of
from mmllm_core.errors import ConfigError

MIX = Mix(0.5, 0.3, 0.2)


@pytest.mark.parametrize("name", ["steady", "daily", "burst", "shift"])
def test_the_peak_is_reached_and_never_passed(name: str) -> None:
    rates = trace_of(name, 100.0, MIX, 1000.0).rates(np.linspace(0, 1000, 1001))
    assert rates.sum(1).max() == pytest.approx(100)
    assert rates.min() >= 0


def test_a_day_is_quiet_at_both_ends_and_a_burst_comes_once() -> None:
    day = trace_of("daily", 100.0, MIX).rates(np.array([0.0, 43_200.0, 86_400.0])).sum(1)
    assert day == pytest.approx([15, 100, 15])
    burst = trace_of("burst", 100.0, MIX, 100.0).rates(np.array([10.0, 50.0, 90.0])).sum(1)
    assert burst == pytest.approx([25, 100, 25])


def test_a_shift_swaps_images_and_sound_and_leaves_text() -> None:
    rates = trace_of("shift", 100.0, MIX, 100.0).rates(np.array([0.0, 99.0]))
    assert rates[0] == pytest.approx([50, 30, 20])
    assert rates[1] == pytest.approx([50, 20, 30])


def test_a_mix_leaves_out_what_does_not_come() -> None:
    assert parse_mix("text=0.75, image=0.25") == Mix(0.75, 0.25, 0.0)
    assert parse_mix("text=0.33,image=0.33,audio=0.33").shares == pytest.approx([1 / 3] * 3)  # as is meant


@pytest.mark.parametrize(
    "said",
    ["", "text", "text=x", "video=1", "text=-1", "text=0", "text=nan", "text=inf", "text=3,image=1", "text=1,text=0"],
)
def test_a_mix_that_cannot_be_is_named(said: str) -> None:
    with pytest.raises(ConfigError, match="--mix"):
        parse_mix(said)


def test_an_unknown_trace_is_named() -> None:
    with pytest.raises(ConfigError, match="--trace weekly: choose one of steady, daily, burst, shift"):
        trace_of("weekly", 1.0, MIX)
