"""Sound: bounded decoding, and Whisper on real speech."""

import io
import struct
import wave
from pathlib import Path
from types import SimpleNamespace

import gradio
import numpy as np
import pytest

from mmllm_core.audio import SAMPLE_RATE, Transcriber, decode_audio
from mmllm_core.errors import AudioError, WeightsError
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve

SPEECH = Path(gradio.__file__).parent / "media_assets" / "audio" / "heath_ledger.mp3"


def wav(samples: np.ndarray, rate: int = SAMPLE_RATE, channels: int = 1) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def tone(seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize(
    "data", [b"", b"not sound", wav(np.zeros(0)), SPEECH.read_bytes()[:40]], ids=["empty", "text", "no-samples", "cut"]
)
def test_what_is_no_sound_is_refused_with_the_field(data: bytes) -> None:
    with pytest.raises(AudioError) as caught:
        decode_audio(data, 60, param="messages.0.content.0.input_audio")
    assert caught.value.param == "messages.0.content.0.input_audio"


def test_a_long_clip_is_refused() -> None:
    with pytest.raises(AudioError, match="longer than 2 seconds"):
        decode_audio(wav(tone(3)), 2)


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 1), (8_000, 2)])
def test_sound_becomes_mono_at_16_khz(rate: int, channels: int) -> None:
    samples = np.repeat(tone(1, rate), channels)
    waveform = decode_audio(wav(samples, rate, channels), 60)
    assert waveform.dtype == np.float32
    assert waveform.shape == (pytest.approx(SAMPLE_RATE, rel=0.01),)
    assert 0.4 < np.abs(waveform).max() <= 1
    spectrum = np.abs(np.fft.rfft(waveform))
    assert np.argmax(spectrum) * SAMPLE_RATE / waveform.size == pytest.approx(440, abs=5)


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    audio = load_profile("embedded").audio
    return Transcriber(audio, resolve(audio.source), threads=1)


def test_real_speech_is_heard(transcriber: Transcriber) -> None:
    transcript = transcriber.transcribe(decode_audio(SPEECH.read_bytes(), 60))
    assert "never do it for free" in transcript.text
    assert transcript.language == "en"
    assert 0 <= transcript.segments[0].start < transcript.segments[-1].end <= transcript.seconds + 0.5


def test_silence_stays_silent(transcriber: Transcriber) -> None:
    assert transcriber.transcribe(np.zeros(3 * SAMPLE_RATE, dtype=np.float32)).text == ""


def test_a_folder_without_whisper_is_one_named_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="CTranslate2"):
        Transcriber(load_profile("embedded").audio, tmp_path)


def test_a_long_clip_is_not_decoded_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    data = wav(np.zeros(600 * SAMPLE_RATE))
    streams = []

    class Recorded(io.BytesIO):
        furthest = 0

        def __init__(self, data: bytes):
            super().__init__(data)
            streams.append(self)

        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size)
            self.furthest = max(self.furthest, self.tell())
            return found

    monkeypatch.setattr("mmllm_core.audio.decode.io", SimpleNamespace(BytesIO=Recorded))
    with pytest.raises(AudioError, match="longer"):
        decode_audio(data, 2)
    assert 0 < streams[0].furthest < len(data) / 10


def test_samples_beyond_full_scale_or_not_numbers_are_tamed() -> None:
    samples = np.tile(np.array([np.nan, np.inf, 5, -7], dtype="<f4"), 4000).tobytes()
    format_chunk = b"fmt " + struct.pack("<IHHIIHH", 16, 3, 1, SAMPLE_RATE, 4 * SAMPLE_RATE, 4, 32)
    data = b"RIFF" + struct.pack("<I", 36 + len(samples)) + b"WAVE" + format_chunk
    waveform = decode_audio(data + b"data" + struct.pack("<I", len(samples)) + samples, 60)
    assert np.isfinite(waveform).all()
    assert np.abs(waveform).max() <= 1
