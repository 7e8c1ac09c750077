"""Waveform -> text, by Whisper: language, windows of speech, tries that fail and are made again, sentences.

Decoding goes on window by window, so that whoever asks may stop between two, and tell what was heard so far. Both
engines are used alike. Does not know containers or files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmllm_core.audio.decode import SAMPLE_RATE
from mmllm_core.audio.engine import REPEATS_ABOVE, Decoded, WhisperEngine
from mmllm_core.audio.languages import ENGLISH, UNSPACED, language_code
from mmllm_core.audio.sentences import segment_of, sentences
from mmllm_core.audio.transcript import Segment, SpeechTask, Transcript, joined
from mmllm_core.audio.windows import Window, speech_windows
from mmllm_core.config import AudioConfig
from mmllm_core.errors import BadInput, ConfigError

_TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Tried one after another where greedy decoding fails. This and the thresholds are those of Whisper's own code."""
_UNSURE_BELOW = -1.0
_SILENCE_ABOVE = 0.6
_CUT_ABOVE = 2 * SAMPLE_RATE
"""Samples of a window that is cut in two where more is said in it than the decoder may write."""


class Transcriber:
    """Whisper, by the engine that the config names.

    Args:
        weights: folder in CTranslate2 layout (`model.bin`, `config.json`, `tokenizer.json`, `vocabulary.*`), whichever
            the engine: openai-whisper runs the same weights, converted once.
        device: "cpu" or "cuda".
        threads: CPU threads; 0 leaves the choice to the engine.

    Raises:
        ConfigError: the config's language is unknown, or not one of these weights.
        WeightsError: the folder cannot be loaded.
        EnvironmentLack: the engine is not installed.
    """

    def __init__(self, config: AudioConfig, weights: Path, device: str = "cpu", threads: int = 0):
        self._config = config
        self._engine = _build_engine(config, weights, device, threads)
        self._language = None
        if config.language is not None:
            try:
                self._language = language_code(config.language, known=self._engine.languages)
            except BadInput as error:
                raise ConfigError(f"audio.language {config.language!r}: {error}") from error

    def transcribe(self, waveform: NDArray[np.float32], task: SpeechTask | None = None) -> Transcript:
        """Transcribe one clip to its end.

        Args:
            waveform: float32 (n_samples,) mono at 16 kHz.

        Raises:
            BadInput: as `begin`.
        """
        begun = self.begin(waveform, task)
        segments: list[Segment] = []
        while (more := begun.next_segments()) is not None:
            segments += more
        return Transcript(joined(segments), begun.language, begun.seconds, tuple(segments))

    def begin(self, waveform: NDArray[np.float32], task: SpeechTask | None = None) -> "Transcription":
        """Begin with one clip: find the first speech in it, and its language.

        Args:
            waveform: float32 (n_samples,) mono at 16 kHz.

        Raises:
            BadInput: the language is unknown or not one of these weights, or they cannot translate.
        """
        task = task or SpeechTask()
        known = self._engine.languages
        if task.translate and known == ENGLISH:
            raise BadInput("the Whisper model that is served hears English only: ask for a transcription", "model")
        language = self._language or ("en" if known == ENGLISH else None)
        if task.language is not None:
            language = language_code(task.language, known=known)
        return Transcription(self._engine, self._config, waveform, task, language)


class Transcription:
    """One clip that is being transcribed. May be left at any time. Not for several threads at once.

    Args:
        language: code; None has it detected.
    """

    def __init__(
        self,
        engine: WhisperEngine,
        config: AudioConfig,
        waveform: NDArray[np.float32],
        task: SpeechTask,
        language: str | None,
    ):
        self._engine = engine
        self._task = task
        self._batch = config.batch_size
        self._tries = _tries(config, task)
        self._windows = speech_windows(waveform)
        self._spoke = False
        self.seconds = waveform.size / SAMPLE_RATE
        self.language = language
        self._first = list(islice(self._windows, 1))
        if language is None and self._first:
            self.language = engine.detect_language(self._first[0].samples)

    def next_segments(self) -> list[Segment] | None:
        """Transcribe as much as is decoded together; None when the clip has ended."""
        windows = [*self._first, *islice(self._windows, self._batch - len(self._first))]
        self._first = []
        if not windows or self.language is None:
            return None
        return [
            segment
            for window, decoded in self._heard(windows, self.language)
            for segment in self._segments(window, decoded)
        ]

    def _heard(self, windows: Sequence[Window], language: str) -> Iterator[tuple[Window, Decoded]]:
        """What was said, to its end: windows in which more is said than may be written at a time are cut in two."""
        for window, decoded in zip(windows, self._decode(windows, language), strict=True):
            if decoded is None:
                continue
            if _is_cut_short(window, decoded):
                for half in window.halves():
                    yield from self._heard([half], language)
            else:
                yield window, decoded

    def _decode(self, windows: Sequence[Window], language: str) -> list[Decoded | None]:
        """What was said in each window; None where nobody spoke. What fails is tried again."""
        best: list[Decoded | None] = [None] * len(windows)
        left = list(range(len(windows)))
        for temperature, in_full in self._tries:
            samples = [windows[i].samples for i in left]
            tried = self._engine.decode(samples, self._task, language, temperature, in_full)
            failed = []
            for i, decoded in zip(left, tried, strict=True):
                if not _has_failed(decoded, in_full) or (in_full and _is_cut_short(windows[i], decoded)):
                    best[i] = decoded
                    continue
                failed.append(i)
                best[i] = max(filter(None, (best[i], decoded)), key=_likeness)
            left = failed
            if not left:
                break
        return [decoded if decoded and not _is_silence(decoded) else None for decoded in best]

    def _segments(self, window: Window, decoded: Decoded) -> Iterator[Segment]:
        found = sentences(window, decoded) if self._task.timed else [_whole(window, decoded)]
        for segment in found:
            if segment.text.strip():
                yield self._parted(segment)

    def _parted(self, segment: Segment) -> Segment:
        """With a space before it, unless it is the first or its language has none."""
        text = segment.text
        written = "en" if self._task.translate else self.language
        if not self._spoke:
            text = text.lstrip()
        elif written not in UNSPACED and not text[:1].isspace():
            text = f" {text}"
        self._spoke = True
        return segment if text == segment.text else replace(segment, text=text)


def _build_engine(config: AudioConfig, weights: Path, device: str, threads: int) -> WhisperEngine:
    if config.engine == "openai-whisper":
        from mmllm_core.audio.openai_whisper_engine import OpenAiWhisperEngine

        return OpenAiWhisperEngine(config, weights, device, threads)
    from mmllm_core.audio.faster_whisper_engine import FasterWhisperEngine

    return FasterWhisperEngine(config, weights, device, threads)


def _tries(config: AudioConfig, task: SpeechTask) -> list[tuple[float, bool]]:
    """Temperatures, and whether windows are read in full, one try after another."""
    if task.temperature > 0:
        return [(task.temperature, True)]
    short = config.engine == "faster-whisper" and config.tail_seconds is not None
    return [(0.0, False)] * short + [(temperature, True) for temperature in (0.0, *_TEMPERATURES)]


def _has_failed(decoded: Decoded, in_full: bool) -> bool:
    if _is_silence(decoded):
        return False
    strayed = not in_full and (not decoded.is_whole or _says_twice(decoded.tokens))
    return strayed or decoded.compression_ratio > REPEATS_ABOVE or decoded.avg_logprob < _UNSURE_BELOW


def _is_cut_short(window: Window, decoded: Decoded) -> bool:
    """Whether there is more in a window than the decoder may write at a time; trying again does not help."""
    return not decoded.is_whole and not decoded.loops and window.samples.size > _CUT_ABOVE


def _says_twice(tokens: Sequence[int], n: int = 3) -> bool:
    """Whether any `n` tokens come twice: what is read with little silence after it is sometimes heard again."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(runs)) < len(runs)


def _likeness(decoded: Decoded) -> tuple[bool, bool, float]:
    """What is best of tries that failed: what does not repeat itself, then what is likeliest."""
    return decoded.compression_ratio <= REPEATS_ABOVE, decoded.is_whole, decoded.avg_logprob


def _is_silence(decoded: Decoded) -> bool:
    return decoded.no_speech_prob > _SILENCE_ABOVE and decoded.avg_logprob < _UNSURE_BELOW


def _whole(window: Window, decoded: Decoded) -> Segment:
    return segment_of(decoded, window.start, window.end, decoded.text, decoded.tokens)
