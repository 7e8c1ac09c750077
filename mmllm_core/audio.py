"""Sound -> text: bounded decoding to a 16 kHz waveform, and Whisper.

In: bytes of any container that FFmpeg's libraries read (wav, mp3, flac, ogg, webm), or a waveform.
Out: a `Transcript` of timed segments. Does not know conversations; a transcript becomes one elsewhere.
"""

import io
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmllm_core.config import AudioConfig
from mmllm_core.errors import AudioError, WeightsError

SAMPLE_RATE = 16_000


@dataclass(frozen=True)
class Segment:
    """What was said between two times, in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was heard in a clip."""

    text: str
    language: str
    seconds: float
    segments: tuple[Segment, ...]


def decode_audio(data: bytes, max_seconds: float, param: str | None = None) -> NDArray[np.float32]:
    """Decode audio to mono 16 kHz, stopping as soon as it proves longer than `max_seconds`.

    Args:
        param: the request field that the bytes came from, for the error.

    Returns:
        float32 (n_samples,) in [-1, 1].

    Raises:
        AudioError: empty, undecodable, without an audio stream, without samples, or too long.
    """
    import av

    if not data:
        raise AudioError("the audio is empty: send the bytes of a wav, mp3, flac, ogg or webm file", param)
    max_samples = int(max_seconds * SAMPLE_RATE)
    chunks: list[NDArray[np.float32]] = []
    n_samples = 0
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.audio:
                raise AudioError("the file holds no audio stream", param)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
            for frame in chain(container.decode(audio=0), [None]):  # None flushes the resampler
                for resampled in resampler.resample(frame):
                    chunk = resampled.to_ndarray().reshape(-1)  # (n,)
                    n_samples += chunk.size
                    if n_samples > max_samples:
                        raise AudioError(
                            f"the audio is longer than {max_seconds:g} seconds: send a shorter clip", param
                        )
                    chunks.append(chunk)
    except (av.FFmpegError, ValueError, EOFError) as error:
        raise AudioError("the audio could not be decoded: send a wav, mp3, flac, ogg or webm file", param) from error
    if n_samples == 0:
        raise AudioError("the audio holds no samples", param)
    waveform = np.concatenate(chunks).astype(np.float32, copy=False)
    return np.clip(np.nan_to_num(waveform), -1, 1)  # float formats hold what they like


class Transcriber:
    """Whisper by faster-whisper, with voice activity detection so that silence stays silent.

    Args:
        weights: folder in CTranslate2 layout (`model.bin`, `config.json`, `tokenizer.json`, `vocabulary.*`).
        device: "cpu" or "cuda".
        threads: CPU threads; 0 leaves the choice to CTranslate2.

    Raises:
        WeightsError: the folder cannot be loaded.
    """

    def __init__(self, config: AudioConfig, weights: Path, device: str = "cpu", threads: int = 0):
        from faster_whisper import WhisperModel

        self._config = config
        try:
            self._model = WhisperModel(
                str(weights),
                device=device,
                compute_type=config.compute_type,
                cpu_threads=threads,
                local_files_only=True,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise WeightsError(f"{weights}: not a Whisper model in CTranslate2 layout: {error}") from error

    def transcribe(self, waveform: NDArray[np.float32]) -> Transcript:
        """Transcribe one clip.

        Args:
            waveform: float32 (n_samples,) mono at 16 kHz.
        """
        language = self._config.language if self._model.model.is_multilingual else "en"
        found, info = self._model.transcribe(
            waveform,
            language=language,
            beam_size=self._config.beam_size,
            vad_filter=True,
            condition_on_previous_text=False,
        )
        segments = tuple(Segment(s.start, s.end, s.text.strip()) for s in found)
        text = " ".join(segment.text for segment in segments if segment.text)
        return Transcript(text, info.language, waveform.size / SAMPLE_RATE, segments)
