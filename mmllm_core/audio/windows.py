"""A clip -> windows of at most 30 seconds in which somebody speaks, cut where nobody does.

Whisper reads 30 seconds at a time. What is no speech is left out (voice activity by Silero's model, which comes with
faster-whisper): nothing is made up about silence or noise. Cuts lie in pauses, or in the quietest moment where nobody
pauses, so that no word is cut, heard twice or left out. A long clip is looked at piece by piece, as it is needed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmllm_core.audio.decode import SAMPLE_RATE

WINDOW_SECONDS = 30
"""What Whisper reads at a time."""
_BLOCK = 120 * SAMPLE_RATE
"""Samples that are searched for speech at a time."""
_LONGEST = WINDOW_SECONDS * SAMPLE_RATE
_CUT_FROM = 20 * SAMPLE_RATE
"""Speech without a pause is cut between here and `_LONGEST`."""
_FRAME = SAMPLE_RATE // 50
_PAUSE_MS, _MARGIN_MS, _LEAST_MS = 500, 400, 100
"""A pause ends speech when it is that long; so much is kept around speech; shorter sounds are no speech."""

Waveform = NDArray[np.float32]
Span = tuple[int, int]
"""First sample, and the one after the last."""


@dataclass(frozen=True)
class Window:
    """Spans of a clip, end to end.

    Args:
        samples: float32 (n_samples,), at most 30 seconds.
        spans: where in the clip they were.
    """

    samples: Waveform
    spans: tuple[Span, ...]

    @property
    def start(self) -> float:
        """Where it begins in the clip, in seconds."""
        return self.spans[0][0] / SAMPLE_RATE

    @property
    def end(self) -> float:
        """Where it ends in the clip, in seconds."""
        return self.spans[-1][1] / SAMPLE_RATE

    def in_clip(self, start: float, end: float) -> tuple[float, float]:
        """Where in the clip something was that lasts from `start` to `end` in the window, all in seconds.

        It lies within one span, that of its middle: nobody speaks over a pause.
        """
        middle = (start + end) / 2 * SAMPLE_RATE
        before = 0
        for first, after in self.spans:
            length = after - first
            if middle < before + length or (first, after) == self.spans[-1]:
                break
            before += length
        shift = (first - before) / SAMPLE_RATE
        low, high = first / SAMPLE_RATE, after / SAMPLE_RATE
        begin = min(max(start + shift, low), high)
        return begin, min(max(end + shift, begin), high)

    def halves(self) -> tuple["Window", "Window"]:
        """Cut in two in the quietest moment of the middle third. For windows of a second or more."""
        third = self.samples.size // 3
        cut = third + _quietest(self.samples[third : 2 * third])
        left: list[Span] = []
        right: list[Span] = []
        before = 0
        for first, after in self.spans:
            border = min(max(first + cut - before, first), after)
            if first < border:
                left.append((first, border))
            if border < after:
                right.append((border, after))
            before += after - first
        return Window(self.samples[:cut], tuple(left)), Window(self.samples[cut:], tuple(right))


def speech_windows(waveform: Waveform) -> Iterator[Window]:
    """Find speech and put it into windows, as few as there can be in order.

    Args:
        waveform: float32 (n_samples,) mono at 16 kHz.
    """
    held: list[Span] = []
    for span in _short_spans(waveform):
        if held and _length(held) + span[1] - span[0] > _LONGEST:
            yield _window(waveform, held)
            held = []
        held.append(span)
    if held:
        yield _window(waveform, held)


def _short_spans(waveform: Waveform) -> Iterator[Span]:
    """Speech in spans of at most 30 seconds."""
    for start, end in _speech(waveform):
        while end - start > _LONGEST:
            cut = start + _CUT_FROM + _quietest(waveform[start + _CUT_FROM : start + _LONGEST])
            yield start, cut
            start = cut
        yield start, end


def _speech(waveform: Waveform) -> Iterator[Span]:
    """Speech, block by block; what a block's end may cut is looked at again with the next.

    So is its last second where nobody seems to speak: somebody who begins there is not noticed yet.
    """
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    options = VadOptions(min_silence_duration_ms=_PAUSE_MS, speech_pad_ms=_MARGIN_MS, min_speech_duration_ms=_LEAST_MS)
    at = 0
    while at < waveform.size:
        block = waveform[at : at + _BLOCK]
        is_last = at + block.size >= waveform.size
        found = [(at + span["start"], at + span["end"]) for span in get_speech_timestamps(block, options)]
        following = at + block.size
        if found and not is_last and found[-1][1] >= following - SAMPLE_RATE:
            start, _ = found.pop()
            if found or start > at + _BLOCK // 2:
                following = start
            else:  # speech without a pause
                from_ = max(start, at + _BLOCK // 2)
                following = from_ + _quietest(waveform[from_:following])
                found.append((start, following))
        elif not is_last:
            following -= SAMPLE_RATE
        yield from found
        at = following


def _quietest(samples: Waveform) -> int:
    """The middle of the quietest tenth of a second, in samples."""
    frames = samples[: samples.size // _FRAME * _FRAME].reshape(-1, _FRAME)
    energy = np.convolve(np.square(frames, dtype=np.float64).mean(axis=1), np.ones(5) / 5, mode="valid")
    return int(np.argmin(energy) * _FRAME + 5 * _FRAME // 2)


def _window(waveform: Waveform, spans: Sequence[Span]) -> Window:
    return Window(np.concatenate([waveform[start:end] for start, end in spans]), tuple(spans))


def _length(spans: Sequence[Span]) -> int:
    return sum(end - start for start, end in spans)
