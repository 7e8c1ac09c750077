"""Bounded decoding of sound files."""

import io
import struct
import tracemalloc
import wave
from pathlib import Path
from types import SimpleNamespace

import gradio
import numpy as np
import pytest

from mmllm_core.audio import SAMPLE_RATE, decode_audio
from mmllm_core.errors import AudioError

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


def riff(rate: int, n_bytes: int) -> bytes:
    layout = struct.pack("<IHHIIHH", 16, 1, 1, rate, (2 * rate) % 2**32, 2, 16)
    body = b"WAVEfmt " + layout + b"data" + struct.pack("<I", n_bytes) + bytes(n_bytes)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("rate", [1, 2**31 - 1])
def test_a_rate_that_no_recording_has_takes_no_memory(rate: int) -> None:
    data = riff(rate, 2_000_000)
    tracemalloc.start()
    with pytest.raises(AudioError):
        decode_audio(data, 1e9)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20_000_000


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(tone(1)))
    for text in (f"ffconcat version 1.0\nfile {secret}\n", f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"):
        with pytest.raises(AudioError, match="could not be decoded"):
            decode_audio(text.encode(), 60)


def test_decoding_ends_when_nobody_waits_for_it() -> None:
    asked = iter([False, False, True])
    waveform = decode_audio(wav(tone(60)), 100, stopped=lambda: next(asked))
    assert waveform.size < 10 * SAMPLE_RATE
