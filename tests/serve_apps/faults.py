"""Mixed requests on a running service while something is done to it, and how each of them ended.

An ending that the caller can tell is no loss: an answer, an error status, or an error event. What must not be is a
request that hangs, and a stream that stops without a word.
"""

import asyncio
import base64
import io
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

HANG_S = 120.0
"""After which a request counts as hung."""


RETRIED = {"429", "500", "503", "504", "broken"}
"""What OpenAI's client tries again."""


@dataclass(frozen=True)
class Ending:
    """How one request ended."""

    kind: str
    """Of its content: text, image or speech."""
    streamed: bool
    how: str
    """`answered`, `error event`, `broken` (the connection, with an error that clients raise), `silent`, `hung`, or a
    status."""
    seconds: float
    first_token_s: float | None = None
    retry_after: str | None = None


@dataclass
class MixedLoad:
    """Sends requests, text, images and speech in turn.

    Args:
        url, model: of the service.
        speech: bytes of an mp3.
        streamed: whether all are, or every other one if None.
        retries: how often a request that failed before its first token is sent again, as OpenAI's client does (twice).
    """

    url: str
    model: str
    speech: bytes
    max_tokens: int = 24
    seed: int = 0
    streamed: bool | None = None
    retries: int = 0
    kinds: Sequence[str] = ("text", "image", "speech")
    endings: list[Ending] = field(default_factory=list)

    async def closed(self, n_requests: int, n_callers: int) -> list[Ending]:
        """`n_callers` who each wait for an answer before they ask again, until `n_requests` were sent."""
        numbers = iter(range(n_requests))

        async def call(client: httpx.AsyncClient) -> None:
            for number in numbers:
                self.endings.append(await self.ask(client, number))

        async with self._client(n_callers) as client:
            await asyncio.gather(*(call(client) for _ in range(n_callers)))
        return self.endings

    async def open(self, per_second: float, seconds: float) -> list[Ending]:
        """Requests that come at a rate, whatever becomes of those before them."""
        waiting = []
        async with self._client(None) as client:
            began = time.monotonic()
            for number in range(int(per_second * seconds)):
                await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
                waiting.append(asyncio.create_task(self.ask(client, number)))
            self.endings += await asyncio.gather(*waiting)
        return self.endings

    async def ask(self, client: httpx.AsyncClient, number: int) -> Ending:
        """Send request `number` and wait for its end, as often as it may be sent."""
        ending = await self._ask(client, number)
        for attempt in range(self.retries):
            if ending.how not in RETRIED or ending.first_token_s is not None:
                break
            await asyncio.sleep(0.5 * 2**attempt)
            ending = await self._ask(client, number)
        return ending

    async def _ask(self, client: httpx.AsyncClient, number: int) -> Ending:
        kind = self.kinds[number % len(self.kinds)]
        streamed = number % 2 == 0 if self.streamed is None else self.streamed
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.content(kind, number)}],
            "max_tokens": self.max_tokens,
            "min_tokens": self.max_tokens,
            "stream": streamed,
        }
        began = time.monotonic()
        first: list[float] = []
        retry_after = None
        try:
            async with asyncio.timeout(HANG_S):
                async with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as reply:
                    retry_after = reply.headers.get("retry-after")
                    if reply.status_code != 200:
                        await reply.aread()
                        how = str(reply.status_code)
                    elif streamed:
                        how = await _end_of_stream(reply, lambda: first.append(time.monotonic() - began))
                    else:
                        how = "answered" if json.loads(await reply.aread())["choices"][0]["finish_reason"] else "silent"
        except TimeoutError:
            how = "hung"
        except httpx.HTTPError:
            how = "broken"
        return Ending(kind, streamed, how, time.monotonic() - began, first[0] if first else None, retry_after)

    def content(self, kind: str, number: int) -> Any:
        """What request `number` says; no two images and texts are the same."""
        if kind == "text":
            return f"{self.seed}-{number}: tell me of rivers."
        if kind == "speech":
            data = base64.b64encode(self.speech).decode()
            return [{"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}}]
        pixels = np.random.default_rng((self.seed, number)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png")
        url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
        return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]

    def _client(self, n_connections: int | None) -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=n_connections))


async def _end_of_stream(reply: httpx.Response, on_token: Callable[[], None]) -> str:
    how = "silent"
    async for line in reply.aiter_lines():
        if line == "data: [DONE]":
            return how
        if line.startswith("data: "):
            body = json.loads(line.removeprefix("data: "))
            if "error" in body:
                how = "error event"
            elif any(choice["delta"].get("content") for choice in body["choices"]):
                on_token()
            elif any(choice["finish_reason"] for choice in body["choices"]):
                how = "answered"
    return "silent"  # even an answer that seems whole ends with [DONE]


def replica_processes(deployment: str) -> list[psutil.Process]:
    """Of this process's own Ray, the replicas of a deployment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if name.startswith("ray::ServeReplica:") and f":{deployment}" in name:
            found.append(process)
    return found


async def kill_now_and_then(app: str, deployments: list[str], until: Awaitable[Any], seed: int = 0) -> Counter[str]:
    """Kill a replica of each deployment in turn, at random and without a warning, until something is done.

    Never the last one of a deployment: it is waited for until another one runs.

    Returns:
        How many of each were killed.
    """
    from ray import serve

    chance = random.Random(seed)
    killed: Counter[str] = Counter()
    done = asyncio.ensure_future(until)
    turns = itertools.cycle(deployments)
    name = next(turns)
    while not (await asyncio.wait({done}, timeout=1))[0]:
        states = serve.status().applications[app].deployments[name].replica_states
        if states.get("RUNNING", 0) < 2 or len(replicas := replica_processes(name)) < 2:
            continue
        os.kill(chance.choice(replicas).pid, signal.SIGKILL)
        killed[name] += 1
        name = next(turns)
    await done
    return killed


def memory_mb(deployments: list[str]) -> dict[str, float]:
    """Resident memory that each deployment's replicas have for themselves, in MB."""
    return {
        name: round(sum(process.memory_full_info().uss for process in replica_processes(name)) / 1e6, 1)
        for name in deployments
    }


def percentile(values: list[float], per_cent: float) -> float | None:
    """Of seconds, to the millisecond; None of none."""
    return round(float(np.percentile(values, per_cent)), 3) if values else None
