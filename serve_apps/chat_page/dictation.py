"""What is being said, written down while it is said.

In: pieces of sound from the microphone. Out: the words so far, by `/v1/audio/transcriptions`; all of the recording is
heard again each time, for a word becomes clear by those after it. Does not know the page.
"""

from __future__ import annotations

import io
import time
import wave
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import openai

MAX_SECONDS = 60
_RATE = 16_000


@dataclass
class Dictation:
    """One recording.

    Attributes:
        heard: the words so far.
        failed: whether the service could not write it down.
    """

    heard: str = ""
    failed: bool = False
    _pieces: list[npt.NDArray[np.int16]] = field(default_factory=list)
    _rate: int = _RATE
    _spent_s: float = 0.0

    @property
    def seconds(self) -> float:
        """How much was recorded."""
        return sum(len(piece) for piece in self._pieces) / self._rate

    def add(self, rate: int, samples: npt.NDArray[Any]) -> None:
        """Take the next piece, mono or stereo, up to `MAX_SECONDS` in all."""
        mono = samples.mean(axis=1) if samples.ndim > 1 else samples
        scale = 32767 if np.issubdtype(mono.dtype, np.floating) and np.abs(mono).max(initial=0) <= 1 else 1
        self._rate = rate
        if self.seconds < MAX_SECONDS:
            self._pieces.append((mono * scale).astype(np.int16))

    @property
    def may_hear(self) -> bool:
        """Whether the service hears, and keeps up; where it is slower than speech, a piece waits for the next."""
        return not self.failed and self.seconds >= 0.5 and self._spent_s <= self.seconds

    async def hear(self, client: openai.AsyncOpenAI) -> None:
        """Write down all of it, unless that has failed before.

        Raises:
            openai.APIError: the service does not answer, or refuses.
        """
        if self.failed or not self._pieces:
            return
        begun = time.monotonic()
        try:
            reply = await client.audio.transcriptions.create(model="whisper-1", file=("speech.wav", self.wav()))
        except openai.APIError:
            self.failed = True
            raise
        finally:
            self._spent_s += time.monotonic() - begun
        self.heard = reply.text.strip()

    def wav(self) -> bytes:
        """The recording as a file."""
        stream = io.BytesIO()
        with wave.open(stream, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self._rate)
            file.writeframes(np.concatenate(self._pieces).tobytes())
        return stream.getvalue()
