"""Whisper as a deployment: a sound file -> what was said in it.

In: the bytes of one clip. Out: a `Transcript`, or its segments as they are heard. Clips are decoded within bounds, and
one window of speech is transcribed at a time, in threads, so that a replica goes on answering health checks while it
listens. Clips take turns, window by window: a short one does not wait for the end of a long one, and one that nobody
waits for any more is left at the next window. Does not know HTTP or conversations.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mmllm_core.audio import SAMPLE_RATE, Segment, SpeechTask, Transcriber, Transcript, decode_audio
from mmllm_core.audio.transcript import joined
from mmllm_core.bundle import Bundle
from serve_apps.config import WhisperConfig
from serve_apps.metrics import counter, histogram
from serve_apps.observability_config import ObservabilityConfig
from serve_apps.speech import Heard, SpeechCall
from serve_apps.tracing import Trace, start_tracing
from serve_apps.upload import Upload
from serve_apps.work_in_flight import WorkInFlight

Result = TypeVar("Result")


class WhisperDeployment:
    """Runs the Whisper model of a bundle.

    Raises:
        BundleError, ConfigError, WeightsError: the bundle cannot be opened or used, which ends the replica's start.
    """

    def __init__(self, bundle: Path, config: WhisperConfig, observability: ObservabilityConfig = ObservabilityConfig()):
        opened = Bundle.open(bundle)
        audio = config.audio(opened.profile.audio)
        self._max_seconds = audio.max_seconds
        self._transcriber = Transcriber(audio, opened.weights(audio.source), config.device, config.n_threads)
        self._work = WorkInFlight("audio", "seconds")
        self._tracer = start_tracing(observability, "audio")
        self._heard, self._took = counter("mmllm_audio_seconds"), counter("mmllm_audio_compute_seconds")
        self._factor = histogram("mmllm_audio_real_time_factor")
        self._decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode-audio")
        self._hearing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transcribe")

    async def transcribe(self, clip: Upload, traceparent: str = "") -> Transcript:
        """Transcribe one clip of a chat.

        Args:
            traceparent: below which this is traced.

        Raises:
            AudioError: the clip cannot be used; it names the field.
        """
        segments: list[Segment] = []
        async with aclosing(self.listen(SpeechCall(clip, SpeechTask(), self._max_seconds), traceparent)) as pieces:
            async for heard in pieces:
                segments += heard.segments
        return Transcript(joined(segments), heard.language, heard.seconds, tuple(segments))

    async def listen(self, call: SpeechCall, traceparent: str = "") -> AsyncGenerator[Heard, None]:
        """Transcribe one clip and tell what is heard as it is heard; whoever leaves ends it.

        Args:
            traceparent: below which this is traced.

        Raises:
            AudioError: the clip cannot be used; it names the field.
            BadInput: the weights do not know the language, or cannot translate.
        """
        loop = asyncio.get_running_loop()
        took = 0.0

        def timed(work: Callable[[], Result]) -> Result:  # in the thread that hears, one at a time
            nonlocal took
            loop.call_soon_threadsafe(self._work.begin, request)
            began = time.perf_counter()
            try:
                return work()
            finally:
                took += time.perf_counter() - began

        # how long a clip is shows when it is decoded
        with self._work.request() as request, Trace(self._tracer, traceparent).span("audio") as (span, _):
            waveform = await self._decode(call)
            request.amount = waveform.size / SAMPLE_RATE
            span.set_attribute("mmllm.audio_seconds", request.amount)
            begun = await loop.run_in_executor(
                self._hearing, timed, lambda: self._transcriber.begin(waveform, call.task)
            )
            yield Heard(begun.language, begun.seconds)
            while (segments := await loop.run_in_executor(self._hearing, timed, begun.next_segments)) is not None:
                yield Heard(begun.language, begun.seconds, tuple(segments))
            if request.amount:
                self._heard.inc(request.amount)
                self._took.inc(took)
                self._factor.observe(took / request.amount)

    async def _decode(self, call: SpeechCall) -> NDArray[np.float32]:
        """The samples of a clip (n_samples,); decoding ends when nobody waits for it."""
        left = threading.Event()
        clip, loop = call.clip, asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._decoding, decode_audio, clip.data, call.max_seconds, clip.param, left.is_set
            )
        finally:
            left.set()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for the seconds of sound that wait or are heard."""
        return self._work.stats()


def require_hearing(bundle: Bundle, config: WhisperConfig) -> None:
    """Fail before a replica starts.

    Raises:
        ConfigError: the config does not go with the bundle's Whisper model.
        EnvironmentLack: the engine is not installed.
    """
    if config.audio(bundle.profile.audio).engine == "openai-whisper":
        from mmllm_core.audio.openai_whisper_engine import require_openai_whisper

        require_openai_whisper()
