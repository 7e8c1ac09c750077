"""Whisper as a deployment: a sound file -> what was said in it.

In: the bytes of one clip. Out: a `Transcript`. Clips are decoded within bounds and transcribed one at a time,
in threads, so that a replica goes on answering health checks while it listens. Does not know HTTP or
conversations.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmllm_core.audio import SAMPLE_RATE, Transcriber, Transcript, decode_audio
from mmllm_core.bundle import Bundle
from serve_apps.config import WhisperConfig
from serve_apps.metrics import counter, histogram
from serve_apps.observability_config import ObservabilityConfig
from serve_apps.tracing import Trace, start_tracing
from serve_apps.upload import Upload
from serve_apps.work_in_flight import WorkInFlight


class WhisperDeployment:
    """Runs the Whisper model of a bundle.

    Raises:
        BundleError, WeightsError: the bundle cannot be opened, which ends the replica's start.
    """

    def __init__(self, bundle: Path, config: WhisperConfig, observability: ObservabilityConfig = ObservabilityConfig()):
        opened = Bundle.open(bundle)
        audio = opened.profile.audio
        self._max_seconds = audio.max_seconds
        self._transcriber = Transcriber(audio, opened.weights(audio.source), config.device, config.n_threads)
        self._work = WorkInFlight("audio", "seconds")
        self._tracer = start_tracing(observability, "audio")
        self._heard, self._took = counter("mmllm_audio_seconds"), counter("mmllm_audio_compute_seconds")
        self._factor = histogram("mmllm_audio_real_time_factor")
        self._decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode-audio")
        self._hearing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transcribe")

    async def transcribe(self, clip: Upload, traceparent: str = "") -> Transcript:
        """Transcribe one clip.

        Args:
            traceparent: below which this is traced.

        Raises:
            AudioError: the clip cannot be used; it names the field.
        """
        loop = asyncio.get_running_loop()
        # how long a clip is shows when it is decoded
        with self._work.request() as request, Trace(self._tracer, traceparent).span("audio") as (span, _):
            waveform = await loop.run_in_executor(
                self._decoding, decode_audio, clip.data, self._max_seconds, clip.param
            )  # (n_samples,)
            request.amount = waveform.size / SAMPLE_RATE

            def hear() -> tuple[Transcript, float]:
                loop.call_soon_threadsafe(self._work.begin, request)
                began = time.perf_counter()
                return self._transcriber.transcribe(waveform), time.perf_counter() - began

            transcript, seconds = await loop.run_in_executor(self._hearing, hear)
            span.set_attribute("mmllm.audio_seconds", request.amount)
            if request.amount:
                self._heard.inc(request.amount)
                self._took.inc(seconds)
                self._factor.observe(seconds / request.amount)
            return transcript

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for the seconds of sound that wait or are heard."""
        return self._work.stats()
