"""The bytes of a sound file -> a waveform, within bounds that hold while it is decoded.

In: bytes of a container that FFmpeg's libraries read (wav, mp3, flac, ogg, webm, mp4). Out: mono samples at 16 kHz. A
file may lie about itself: rates, lengths and streams are taken from what is decoded, and nothing else is opened that
it points to.
"""

import io
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmllm_core.errors import AudioError

if TYPE_CHECKING:
    from av import AudioFrame
    from av.container import InputContainer

SAMPLE_RATE = 16_000
_RATES = (1_000, 768_000)
"""Samples a second that a file may have; a resampler's filters take memory by the ratio of rates."""
_CHANNELS = 64
_CONTAINERS = "aac,aiff,amr,asf,au,caf,flac,matroska,webm,mov,mp4,m4a,3gp,mp3,mpegts,ogg,w64,wav"
"""Demuxers that may be used; playlists, which open other files and addresses, are not among them."""
_KINDS = "send a wav, mp3, flac, ogg, webm or m4a file"


def decode_audio(
    data: bytes, max_seconds: float, param: str | None = None, stopped: Callable[[], bool] = lambda: False
) -> NDArray[np.float32]:
    """Decode audio to mono 16 kHz, stopping as soon as it proves longer than `max_seconds`.

    Args:
        param: the request field that the bytes came from, for the error.
        stopped: asked now and then whether anybody still wants it.

    Returns:
        float32 (n_samples,) in [-1, 1]; what there is so far if it was stopped.

    Raises:
        AudioError: empty, undecodable, without an audio stream, without samples, of a rate that no recording has, or
            too long.
    """
    import av

    if not data:
        raise AudioError(f"the audio is empty: {_KINDS}", param)
    chunks: list[NDArray[np.float32]] = []
    try:
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": ""}
        with av.open(io.BytesIO(data), mode="r", container_options=options) as container:
            if not container.streams.audio:
                raise AudioError("the file holds no audio stream", param)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
            for frame in chain(_bounded(container, max_seconds, param), [None]):  # None flushes the resampler
                chunks += [resampled.to_ndarray().reshape(-1) for resampled in resampler.resample(frame)]  # (n,) each
                if stopped():
                    break
    except (av.FFmpegError, ValueError, EOFError, MemoryError) as error:
        raise AudioError(f"the audio could not be decoded: {_KINDS}", param) from error
    if not chunks:
        raise AudioError("the audio holds no samples", param)
    waveform = np.concatenate(chunks)[: int(max_seconds * SAMPLE_RATE)].astype(np.float32, copy=False)
    return np.clip(np.nan_to_num(waveform, copy=False), -1, 1, out=waveform)  # float formats hold what they like


def _bounded(container: "InputContainer", max_seconds: float, param: str | None) -> Iterator["AudioFrame"]:
    """Frames, as long as they are ones that can be resampled and are not too long together."""
    seconds = 0.0
    for frame in container.decode(audio=0):
        lowest, highest = _RATES
        if not lowest <= frame.sample_rate <= highest or frame.layout.nb_channels > _CHANNELS:
            raise AudioError(
                f"the audio claims {frame.sample_rate} samples a second in {frame.layout.nb_channels} channels: send "
                f"{lowest} to {highest} in at most {_CHANNELS}",
                param,
            )
        seconds += frame.samples / frame.sample_rate
        if seconds > max_seconds:
            raise AudioError(f"the audio is longer than {max_seconds:g} seconds: send a shorter clip", param)
        yield frame
