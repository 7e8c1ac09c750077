"""Asks a service for streamed answers about text, pictures and speech, no two alike, and tells how long each took.

In: a service. Out: seconds to the first token and to the last. Does not know what is made of them.
"""

import io
import json
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmllm_core.audio import SAMPLE_RATE
from tests.serve_apps.conftest import Service, audio_part, data_uri, image_part, wav
from tests.spoken_sentences import recordings

PAUSE_S = 0.7


@dataclass(frozen=True)
class Asked:
    """One streamed answer."""

    kind: str
    first_s: float
    whole_s: float
    prompt_tokens: int


class Caller:
    """Asks a service for streamed answers of so many tokens, no two of them alike."""

    def __init__(self, service: Service):
        self._service = service
        self._chance = np.random.default_rng(7)
        self._number = 0

    async def ask(self, client: httpx.AsyncClient, kind: str, content: Any, tokens: int) -> Asked:
        """One answer.

        Raises:
            ConnectionError: the service refused.
        """
        body = {
            **self._service.body(content, max_tokens=tokens, min_tokens=tokens, stream=True),
            "stream_options": {"include_usage": True},
        }
        began, first, used = time.perf_counter(), 0.0, 0
        async with client.stream("POST", f"{self._service.base_url}/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise ConnectionError(f"{reply.status_code}: {(await reply.aread()).decode()[:300]}")
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                told = json.loads(line.removeprefix("data: "))
                if "error" in told:
                    raise ConnectionError(str(told["error"]))
                if not first and any(choice["delta"].get("content") for choice in told["choices"]):
                    first = time.perf_counter() - began
                if told.get("usage"):
                    used = told["usage"]["prompt_tokens"]
        whole = time.perf_counter() - began
        return Asked(kind, first or whole, whole, used)

    def text(self, words: int = 12) -> str:
        """A prompt that begins like no other, so that nothing of it was computed before."""
        self._number += 1
        return f"{self._number} of " + " ".join(self._chance.choice(WORDS, words))

    def images(self, n: int = 1) -> list[Any]:
        """Pictures of 640 x 480, JPEG, and a question."""
        parts = []
        for _ in range(n):
            small = self._chance.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            stream = io.BytesIO()
            Image.fromarray(small).resize((640, 480)).save(stream, "jpeg")
            parts.append(image_part(data_uri(stream.getvalue(), "jpeg")))
        return [*parts, {"type": "text", "text": self.text()}]

    def sound(self, sentences: int = 1) -> list[Any]:
        """A sentence, or several that differ, with a pause between them: what is repeated is heard twice over."""
        self._number += 1
        return [audio_part(wav(spoken(self._number, sentences))), {"type": "text", "text": self.text()}]

    def content(self, kind: str) -> Any:
        """A request of a kind, as `compare` sends it."""
        return {"text": self.text, "image": self.images, "audio": self.sound}[kind]()


WORDS = ["river", "stone", "cloud", "green", "market", "paper", "engine", "winter", "garden", "silver"]


def spoken(number: int, sentences: int) -> NDArray[np.float32]:
    """Samples (n,) of so many sentences that follow each other, from the `number`-th on."""
    chosen = [recordings()[(number + i) % len(recordings())] for i in range(sentences)]
    pause = np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
    return np.concatenate([part for one in chosen for part in (one, pause)][:-1])


@cache
def spoken_seconds(sentences: int) -> float:
    """Of so many sentences, on average."""
    one = sum(len(recording) for recording in recordings()) / len(recordings()) / SAMPLE_RATE
    return sentences * (one + PAUSE_S) - PAUSE_S
