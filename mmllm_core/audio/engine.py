"""What an engine that runs Whisper does: a few windows at a time -> what was said in each.

Windows are speech of at most 30 seconds. Engines do not look for speech, do not put windows together, and try once:
`mmllm_core.audio.transcriber` does the rest, alike for all of them.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmllm_core.audio.transcript import SpeechTask, Word

SAMPLES_PER_POSITION = 2 * 160
"""Of the encoder."""
MAX_TOKENS = 224
"""Of a window, as in Whisper's own code: half of the decoder's context."""
TOKENS_PER_SECOND = 12
"""More than anybody says: a decoder that writes more repeats itself."""
REPEATS_ABOVE = 2.4
"""A compression ratio, as in Whisper's own code."""
SAMPLES_AT_TEMPERATURE = 5
"""Of which the likeliest is taken, as in Whisper's own code."""
PREPENDED = "\"'\u201c\u00bf([{-"
APPENDED = "\"'.\u3002,\uff0c!\uff01?\uff1f:\uff1a\u201d)]}\u3001"
"""Punctuation that belongs to the word after and before it, as in Whisper's own code."""


@dataclass(frozen=True)
class Decoded:
    """One try at a window.

    Args:
        text: with the space that it begins with.
        words: in seconds from the window's start, if they were asked for.
        is_whole: False where the decoder was stopped: there may be more in the window.
    """

    text: str
    tokens: tuple[int, ...]
    avg_logprob: float
    no_speech_prob: float
    temperature: float
    is_whole: bool
    words: tuple[Word, ...] = ()

    @property
    def compression_ratio(self) -> float:
        """How well the text compresses: what repeats itself does so well."""
        data = self.text.encode()
        return len(data) / len(zlib.compress(data)) if data else 1.0

    @property
    def loops(self) -> bool:
        """Whether it was stopped as it repeated itself, by characters: bytes of some scripts always compress well."""
        return not self.is_whole and len(self.text) > REPEATS_ABOVE * len(zlib.compress(self.text.encode()))


class WhisperEngine(Protocol):
    """Runs one Whisper model. Not for several threads."""

    languages: frozenset[str]
    """Codes of what these weights hear."""

    def detect_language(self, samples: NDArray[np.float32]) -> str:
        """The code of the likeliest language of a window, float32 (n_samples,)."""

    def decode(
        self, windows: Sequence[NDArray[np.float32]], task: SpeechTask, language: str, temperature: float, in_full: bool
    ) -> list[Decoded]:
        """Decode windows together, once.

        Args:
            windows: float32 (n_samples,) each.
            language: code of the language that is spoken.
            temperature: to sample at; the task's own is not looked at.
            in_full: whether windows are read as 30 seconds whatever their length, as in Whisper's training.
        """


def token_limit(seconds: float) -> int:
    """Tokens after which a decoder is stopped that heard so much."""
    return min(MAX_TOKENS, 16 + int(TOKENS_PER_SECOND * seconds))
