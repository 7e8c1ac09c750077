"""Whisper by OpenAI's own code, on the same weights as faster-whisper, converted once.

In: windows. Out: what was said in each. Windows are always read as 30 seconds. An extra: pip install
'mmllm[openai-whisper]'.
"""

import importlib.util
import json
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
from mmllm_core.errors import EnvironmentLack, WeightsError
from mmllm_core.interop.whisper_weights import DIMENSIONS, WEIGHTS, openai_whisper_weights


class OpenAiWhisperEngine:
    """openai-whisper.

    Args:
        weights: folder of a Whisper model in CTranslate2 layout, in float16 or float32.
        threads: CPU threads of this process's torch; 0 leaves the choice to torch.

    Raises:
        EnvironmentLack: openai-whisper is not installed.
        WeightsError: the weights cannot be converted.
    """

    def __init__(self, config: AudioConfig, weights: Path, device: str, threads: int):
        require_openai_whisper()
        import torch

        if threads:
            torch.set_num_threads(threads)
        self._beams = config.beam_size
        self._half = config.compute_type == "float16"
        self._device = device
        self._model = load_openai_whisper(weights, device)
        if self._half:
            self._model = self._model.half()
        multilingual = self._model.is_multilingual
        self.languages = frozenset(known_codes()[: self._model.num_languages]) if multilingual else ENGLISH

    def detect_language(self, samples: NDArray[np.float32]) -> str:
        """As `WhisperEngine.detect_language`."""
        _, [probabilities] = self._model.detect_language(self._mel([samples]))
        likeliest: str = max(probabilities, key=probabilities.__getitem__)
        return likeliest

    def decode(
        self, windows: Sequence[NDArray[np.float32]], task: SpeechTask, language: str, temperature: float, in_full: bool
    ) -> list[Decoded]:
        """As `WhisperEngine.decode`."""
        from whisper.decoding import DecodingOptions, DecodingTask

        greedy = temperature == 0
        options = DecodingOptions(
            task="translate" if task.translate else "transcribe",
            language=language,
            temperature=temperature,
            best_of=None if greedy else SAMPLES_AT_TEMPERATURE,
            beam_size=self._beams if greedy and self._beams > 1 else None,
            sample_len=token_limit(WINDOW_SECONDS),
            prompt=task.prompt.strip() or None,
            without_timestamps=True,
            fp16=self._half,
        )
        mel = self._mel(windows)
        decoding = DecodingTask(self._model, options)
        limit = min(decoding.sample_len, decoding.n_ctx - decoding.sample_begin + 1)  # a long prompt leaves less
        results = decoding.run(mel)
        words = self._words(results, mel, windows, task, language) if task.timed else [()] * len(windows)
        # Whisper strips what it decodes; the space at a text's beginning is in its tokens.
        tokenizer = self._tokenizer(task, language)
        return [
            Decoded(
                text=tokenizer.decode(result.tokens),
                tokens=tuple(result.tokens),
                avg_logprob=result.avg_logprob,
                no_speech_prob=result.no_speech_prob,
                temperature=temperature,
                is_whole=len(result.tokens) < limit,
                words=timed,
            )
            for result, timed in zip(results, words, strict=True)
        ]

    def _mel(self, windows: Sequence[NDArray[np.float32]]) -> Any:
        import torch
        from whisper import log_mel_spectrogram, pad_or_trim

        n_mels = self._model.dims.n_mels
        padded = torch.from_numpy(np.stack([pad_or_trim(window, WINDOW_SECONDS * SAMPLE_RATE) for window in windows]))
        mel = [log_mel_spectrogram(samples, n_mels) for samples in padded]
        dtype = torch.float16 if self._half else torch.float32
        return torch.stack(mel).to(self._device, dtype)  # (n_windows, n_mels, 3000)

    def _tokenizer(self, task: SpeechTask, language: str) -> Any:
        from whisper.tokenizer import get_tokenizer

        return get_tokenizer(
            self._model.is_multilingual,
            num_languages=self._model.num_languages,
            language=language,
            task="translate" if task.translate else "transcribe",
        )

    def _words(
        self, results: Any, mel: Any, windows: Sequence[NDArray[np.float32]], task: SpeechTask, language: str
    ) -> list[tuple[Word, ...]]:
        from whisper.timing import find_alignment, merge_punctuations

        tokenizer = self._tokenizer(task, language)
        found = []
        for result, spectrum, window in zip(results, mel, windows, strict=True):
            frames = 2 * (window.size // SAMPLES_PER_POSITION)
            alignment: Any = find_alignment(self._model, tokenizer, result.tokens, spectrum, frames) if frames else []
            merge_punctuations(alignment, PREPENDED, APPENDED)
            found.append(tuple(Word(float(w.start), float(w.end), w.word) for w in alignment if w.word))
        return found


def require_openai_whisper() -> None:
    """Fail early.

    Raises:
        EnvironmentLack: openai-whisper is not installed.
    """
    if importlib.util.find_spec("whisper") is None:
        raise EnvironmentLack("openai-whisper is not installed: pip install 'mmllm[openai-whisper]'")


def load_openai_whisper(weights: Path, device: str) -> Any:
    """openai-whisper's own model with the numbers of a CTranslate2 folder, in float32 and eval mode.

    Raises:
        WeightsError: the weights cannot be converted.
    """
    import torch
    from safetensors.torch import load_file
    from whisper.model import ModelDimensions, Whisper

    folder = openai_whisper_weights(weights)
    dims = json.loads((folder / DIMENSIONS).read_text(encoding="utf-8"))
    heads = dims.pop("alignment_heads")
    model = Whisper(ModelDimensions(**dims))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        raise WeightsError(f"{weights}: not a Whisper model that openai-whisper knows: {error}") from error
    if heads:
        mask = torch.zeros(model.dims.n_text_layer, model.dims.n_text_head, dtype=torch.bool)
        for layer, head in heads:
            mask[layer, head] = True
        model.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    return model.to(device).eval()
