"""Steps of load on one modality after another, and the replicas of each that followed.

Closed loops of callers keep so much work in flight over HTTP until the modality has the replicas that are waited for;
then they stop, and its replicas are waited for to end. Every sample tells the work that callers wait for, and how many
replicas run.
"""

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from serve_apps.builder import CLIP, PHI, WHISPER

DEPLOYMENTS = {"vision": CLIP, "audio": WHISPER, "text": PHI}
UNITS = {"vision": "images", "audio": "seconds", "text": "tokens"}
IMAGES, SIDE = 6, 2000
"""Images of a request, and their pixels a side: decoding them is what a tiny CLIP takes longest for."""
PROMPT, ANSWER = "Tell me of rivers. " * 30, 300
"""What is asked, and tokens of an answer."""

CONFIG: dict[str, Any] = {
    "ui": False,
    "ingress.cache_bytes": 0,  # callers send their images again and again
    "clip.cache_bytes": 0,
    "clip.autoscaling": {"min_replicas": 0, "max_replicas": 3, "target_images": 16, "images_per_request": 2},
    "whisper.autoscaling": {"min_replicas": 0, "max_replicas": 3, "target_seconds": 8, "seconds_per_request": 3},
    "phi.autoscaling": {"min_replicas": 1, "max_replicas": 3, "target_tokens": 2500},
    "whisper.threads": 1,
    "phi.threads": 1,
    "phi.kv_cache_bytes": 60_000_000,
} | {
    f"{part}.autoscaling.{key}": value
    for part in ("clip", "whisper", "phi")
    for key, value in {
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "look_back_s": 2,
        "metrics_interval_s": 0.5,
    }.items()
}
"""Overrides of the embedded config: quick to follow, and small enough for two cores."""


@dataclass(frozen=True)
class Sample:
    """What was so at one time."""

    seconds: float
    load: dict[str, float]
    """Work that callers wait for, by modality, in its unit; of a text request the tokens asked for."""
    replicas: dict[str, int]


@dataclass
class Step:
    """Load on one modality, in seconds since the start of the trace."""

    modality: str
    begin: float
    end: float = 0.0
    settled: float = 0.0
    requests: int = 0
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Caller:
    """One request to be sent again and again."""

    content: Any
    work: float
    tokens: int = 1


class StepLoad:
    """Loads a running service and watches it.

    Args:
        url, model, app: of the service.
    """

    def __init__(self, url: str, model: str, app: str):
        self._url, self._model, self._app = url, model, app
        self._began = time.monotonic()
        self._load = dict.fromkeys(DEPLOYMENTS, 0.0)
        self._lock = threading.Lock()
        self.samples: list[Sample] = []
        self.steps: list[Step] = []

    def now(self) -> float:
        """Seconds since the trace began."""
        return time.monotonic() - self._began

    @contextmanager
    def watched(self, interval_s: float = 0.25) -> Iterator[None]:
        """Take samples while the block runs."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(interval_s):
                self.samples.append(self._sample())

        thread = threading.Thread(target=watch, name="watch-replicas")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def step(self, modality: str, callers: list[Caller], *, up_to: int, least_s: float = 0.0) -> Step:
        """Load a modality until it has `up_to` replicas, and wait until it is back where it was.

        Raises:
            TimeoutError: it did not get there, or not back.
        """
        at_rest = self._sample().replicas[modality]
        step = Step(modality, self.now())
        self.steps.append(step)
        enough = threading.Event()
        threads = [threading.Thread(target=self._call, args=(step, caller, enough)) for caller in callers]
        for thread in threads:
            thread.start()
        try:
            self._wait(lambda now: now.replicas[modality] >= up_to, f"{modality} to have {up_to} replicas")
            time.sleep(max(0.0, step.begin + least_s - self.now()))
        finally:
            enough.set()
            step.end = self.now()
            for thread in threads:
                thread.join()
        self._wait(lambda now: now.replicas[modality] <= at_rest, f"{modality} to return to {at_rest} replicas")
        step.settled = self.now()
        return step

    def ask(self, content: Any, tokens: int) -> dict[str, Any]:
        """One request, answered whole."""
        body = {"model": self._model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens}
        reply = httpx.post(f"{self._url}/v1/chat/completions", json=body, timeout=240)
        if reply.status_code != 200:
            raise ConnectionError(f"{reply.status_code}: {reply.text[:300]}")
        answer: dict[str, Any] = reply.json()
        return answer

    def trace(self) -> dict[str, Any]:
        """Everything that was seen, for JSON."""
        return {
            "units": UNITS,
            "steps": [asdict(step) for step in self.steps],
            "samples": [asdict(sample) for sample in self.samples],
        }

    def _call(self, step: Step, caller: Caller, enough: threading.Event) -> None:
        while not enough.is_set():
            self._add(step.modality, caller.work)
            try:
                self.ask(caller.content, caller.tokens)
            except (httpx.HTTPError, ConnectionError) as error:
                step.failed.append(repr(error))
            finally:
                self._add(step.modality, -caller.work)
                step.requests += 1

    def _add(self, modality: str, work: float) -> None:
        with self._lock:
            self._load[modality] += work

    def _sample(self) -> Sample:
        from ray import serve

        found = serve.status().applications[self._app].deployments
        running = {name: found[d].replica_states.get("RUNNING", 0) for name, d in DEPLOYMENTS.items()}
        with self._lock:
            return Sample(self.now(), dict(self._load), running)

    def _wait(self, until: Callable[[Sample], bool], what: str, timeout_s: float = 150.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not until(now := self._sample()):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {timeout_s:g} s for {what}; replicas are {now.replicas}, load is {now.load}"
                )
            time.sleep(0.2)


def of_images(n_callers: int) -> list[Caller]:
    """Callers that show large images, each its own, so that nobody shares another's work."""
    callers = []
    for caller in range(n_callers):
        parts = []
        for image in range(IMAGES):
            y, x = np.mgrid[0:SIDE, 0:SIDE]
            shade = (x * y // (1000 + 37 * caller + image)) % 256
            stream = io.BytesIO()
            Image.fromarray(np.stack([shade, x // 8 % 256, y // 8 % 256], -1).astype(np.uint8)).save(stream, "jpeg")
            url = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        callers.append(Caller([*parts, {"type": "text", "text": "What?"}], work=IMAGES))
    return callers


def of_speech(n_callers: int, clip: bytes, seconds: float) -> list[Caller]:
    """Callers that send an mp3."""
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(clip).decode(), "format": "mp3"}}
    return [Caller([part], work=seconds)] * n_callers


def of_text(n_callers: int) -> list[Caller]:
    """Callers that ask for long answers."""
    return [Caller(PROMPT, work=ANSWER, tokens=ANSWER)] * n_callers
