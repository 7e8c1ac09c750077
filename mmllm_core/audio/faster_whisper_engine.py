"""Whisper by CTranslate2, with faster-whisper's tokenizer, features and word alignment.

In: windows. Out: what was said in each. Windows shorter than 30 seconds are not filled up to them unless it is asked
for: most of the work is reading, and most of what would be read is silence.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmllm_core.audio.decode import SAMPLE_RATE
from mmllm_core.audio.engine import (
    APPENDED,
    PREPENDED,
    SAMPLES_AT_TEMPERATURE,
    SAMPLES_PER_POSITION,
    Decoded,
    token_limit,
)
from mmllm_core.audio.languages import ENGLISH, known_codes
from mmllm_core.audio.transcript import SpeechTask, Word
from mmllm_core.audio.windows import WINDOW_SECONDS
from mmllm_core.config import AudioConfig
from mmllm_core.errors import WeightsError, first_line


class FasterWhisperEngine:
    """Whisper in CTranslate2 layout.

    Args:
        weights: folder of `model.bin`, `config.json`, `tokenizer.json`, `vocabulary.*`.
        threads: CPU threads; 0 leaves the choice to CTranslate2.

    Raises:
        WeightsError: the folder cannot be loaded.
    """

    def __init__(self, config: AudioConfig, weights: Path, device: str, threads: int):
        from faster_whisper import WhisperModel

        self._beams = config.beam_size
        self._tail = config.tail_seconds
        try:
            self._model = WhisperModel(
                str(weights),
                device=device,
                compute_type=config.compute_type,
                cpu_threads=threads,
                local_files_only=True,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise WeightsError(
                f"{weights}: not a Whisper model in CTranslate2 layout that computes in {config.compute_type} on "
                f"{device}: {first_line(error)}"
            ) from error
        self._is_multilingual = bool(self._model.model.is_multilingual)
        self.languages = languages_of(self._model.hf_tokenizer) if self._is_multilingual else ENGLISH

    def detect_language(self, samples: NDArray[np.float32]) -> str:
        """As `WhisperEngine.detect_language`."""
        [found] = self._model.model.detect_language(self._encode([samples], in_full=True))
        return str(found[0][0])[2:-2]  # <|en|>

    def decode(
        self, windows: Sequence[NDArray[np.float32]], task: SpeechTask, language: str, temperature: float, in_full: bool
    ) -> list[Decoded]:
        """As `WhisperEngine.decode`."""
        tokenizer = self._tokenizer(task, language)
        prompt = self._prompt(tokenizer, task)
        seconds = max(window.size for window in windows) / SAMPLE_RATE
        max_length, limit = self._lengths(len(prompt), token_limit(WINDOW_SECONDS if in_full else seconds))
        encoded = self._encode(windows, in_full)
        results = self._model.model.generate(
            encoded,
            [prompt] * len(windows),
            max_length=max_length,
            suppress_tokens=self._suppressed(tokenizer),
            return_scores=True,
            return_no_speech_prob=True,
            **self._search(temperature),
        )
        tokens = [result.sequences_ids[0] for result in results]
        words = self._words(tokenizer, tokens, encoded, windows) if task.timed else [()] * len(windows)
        return [
            Decoded(
                text=tokenizer.decode(ids),
                tokens=tuple(ids),
                avg_logprob=result.scores[0] * len(ids) / (len(ids) + 1),  # scores are means without the end
                no_speech_prob=result.no_speech_prob,
                temperature=temperature,
                is_whole=len(ids) < limit,
                words=timed,
            )
            for result, ids, timed in zip(results, tokens, words, strict=True)
        ]

    def _lengths(self, n_prompt: int, limit: int) -> tuple[int, int]:
        """CTranslate2's `max_length` that lets so many tokens be written, and how many it lets be written.

        It writes half of `max_length` at most, and what the prompt, all but its last token, leaves of it.
        """
        max_length = min(self._model.max_length, max(2 * limit, n_prompt - 1 + limit))
        return max_length, min(max_length // 2, max_length - n_prompt + 1)

    def _search(self, temperature: float) -> dict[str, Any]:
        if temperature == 0:
            return {"beam_size": self._beams}
        return {
            "beam_size": 1,
            "num_hypotheses": SAMPLES_AT_TEMPERATURE,
            "sampling_topk": 0,
            "sampling_temperature": temperature,
        }

    def _encode(self, windows: Sequence[NDArray[np.float32]], in_full: bool) -> Any:
        """The encoder's output for windows, silence behind each."""
        longest = max(window.size for window in windows)
        n_samples = WINDOW_SECONDS * SAMPLE_RATE
        if not in_full and self._tail is not None:
            n_samples = min(
                n_samples, -(-(longest + int(self._tail * SAMPLE_RATE)) // SAMPLES_PER_POSITION) * SAMPLES_PER_POSITION
            )
        padded = [np.pad(window[:n_samples], (0, max(0, n_samples - window.size))) for window in windows]
        mel = np.stack([self._model.feature_extractor(samples, padding=0) for samples in padded])
        return self._model.encode(mel)  # (n_windows, n_mels, n_samples / 160)

    def _tokenizer(self, task: SpeechTask, language: str) -> Any:
        from faster_whisper.tokenizer import Tokenizer

        kind = "translate" if task.translate else "transcribe"
        return Tokenizer(self._model.hf_tokenizer, self._is_multilingual, task=kind, language=language)

    def _prompt(self, tokenizer: Any, task: SpeechTask) -> list[int]:
        before = tokenizer.encode(f" {task.prompt.strip()}") if task.prompt.strip() else []
        return list(self._model.get_prompt(tokenizer, before, without_timestamps=True))

    def _suppressed(self, tokenizer: Any) -> Any:
        from faster_whisper.transcribe import get_suppressed_tokens

        return get_suppressed_tokens(tokenizer, [-1])

    def _words(
        self, tokenizer: Any, tokens: list[list[int]], encoded: Any, windows: Sequence[NDArray[np.float32]]
    ) -> list[tuple[Word, ...]]:
        """Times of words: the decoder's attention follows the sound, over each window's own length."""
        from faster_whisper.transcribe import merge_punctuations

        frames = [2 * (window.size // SAMPLES_PER_POSITION) for window in windows]
        if len(windows) == 1 or all(tokens):
            alignments = self._align(tokenizer, tokens, encoded, frames)
        else:  # nothing cannot be aligned
            alignments = [
                self._align(tokenizer, [ids], self._encode([window], in_full=True), [n])[0] if ids else []
                for ids, window, n in zip(tokens, windows, frames, strict=True)
            ]
        for alignment in alignments:
            merge_punctuations(alignment, PREPENDED, APPENDED)
        return [
            tuple(Word(float(w["start"]), float(w["end"]), w["word"]) for w in alignment if w["word"])
            for alignment in alignments
        ]

    def _align(self, tokenizer: Any, tokens: list[list[int]], encoded: Any, frames: list[int]) -> list[Any]:
        return list(self._model.find_alignment(tokenizer, tokens, encoded, frames)) if any(tokens) else [[]]


def languages_of(tokenizer: Any) -> frozenset[str]:
    """Codes of the languages that a multilingual model's tokenizer has tokens for."""
    return frozenset(code for code in known_codes() if tokenizer.token_to_id(f"<|{code}|>") is not None)
