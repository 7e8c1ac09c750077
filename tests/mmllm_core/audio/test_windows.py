"""Windows of speech in a clip."""

from itertools import pairwise

import numpy as np
import pytest

from mmllm_core.audio import SAMPLE_RATE, windows
from mmllm_core.audio.windows import Window, speech_windows
from tests.spoken_sentences import joined_recordings, recordings


@pytest.mark.lengthy
def test_windows_are_cut_in_pauses_and_hold_all_of_the_speech() -> None:
    clip = joined_recordings((0.05,))  # no pause is long enough to end a stretch of speech
    found = list(speech_windows(clip))
    spans = [span for window in found for span in window.spans]
    assert all(window.samples.size <= 30 * SAMPLE_RATE for window in found)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    left_out = np.ones(clip.size, dtype=bool)
    for start, end in spans:
        left_out[start:end] = False
    assert np.sum(clip[left_out] ** 2) < 1e-3 * np.sum(clip**2)
    for before, after in pairwise(spans):
        if before[1] == after[0]:  # cut where nobody pauses
            assert np.abs(clip[before[1] - 160 : before[1] + 160]).max() < 0.1 * np.abs(clip).max()


@pytest.mark.lengthy
@pytest.mark.parametrize("begins", [-0.6, -0.2, -0.09, -0.05, 0.0, 0.2, 0.5])
def test_who_begins_at_the_end_of_a_block_is_heard_whole(monkeypatch: pytest.MonkeyPatch, begins: float) -> None:
    block = 20 * SAMPLE_RATE
    silence = np.zeros(block + int(begins * SAMPLE_RATE), dtype=np.float32)
    spoken = recordings()[0]
    onset = int(np.argmax(np.abs(spoken) > 0.05 * np.abs(spoken).max()))
    silence[: spoken.size] = spoken
    clip = np.concatenate([silence, spoken[onset:], np.zeros(5 * SAMPLE_RATE, dtype=np.float32)])
    at_once = [span for window in speech_windows(clip) for span in window.spans]
    monkeypatch.setattr(windows, "_BLOCK", block)
    spans = [span for window in speech_windows(clip) for span in window.spans]
    assert len(spans) == len(at_once) == 2
    assert spans[0][1] <= spans[1][0]
    for (start, end), (first, after) in zip(spans, at_once, strict=True):
        assert start <= first + 0.1 * SAMPLE_RATE
        assert end >= after - 0.1 * SAMPLE_RATE


def test_times_in_a_window_become_those_of_the_clip() -> None:
    window = Window(np.zeros(3 * SAMPLE_RATE, dtype=np.float32), ((SAMPLE_RATE, 2 * SAMPLE_RATE), (160_000, 192_000)))
    assert window.in_clip(0.25, 0.5) == (1.25, 1.5)
    assert window.in_clip(1.5, 2.0) == (10.5, 11.0)
    assert window.in_clip(0.9, 1.5) == (10.0, 10.5)  # nobody speaks over a pause
    assert window.in_clip(2.9, 9.0) == (11.9, 12.0)


def test_halves_of_a_window_are_all_of_it_and_lie_where_it_lay() -> None:
    samples = np.full(9 * SAMPLE_RATE, 0.5, dtype=np.float32)
    samples[4 * SAMPLE_RATE : 5 * SAMPLE_RATE] = 0  # also across the border of two spans
    second = SAMPLE_RATE
    for spans in (
        ((0, 9 * second),),
        ((0, 2 * second), (5 * second, 12 * second)),
        ((0, 5 * second), (10 * second, 14 * second)),
    ):
        left, right = Window(samples, spans).halves()
        assert 4 * second <= left.samples.size <= 5 * second
        assert np.array_equal(np.concatenate([left.samples, right.samples]), samples)
        for half in (left, right):
            assert sum(after - first for first, after in half.spans) == half.samples.size
        assert left.spans[0][0] == spans[0][0]
        assert right.spans[-1][1] == spans[-1][1]
        assert left.end <= right.start
