"""How long each part of a request takes, measured on a service that does nothing else, one part after the other.

In: a bundle. Out: a YAML file of `cluster.capacity.service_times`. `python -m tests.bench.capacity measure` runs it.
"""

import asyncio
import io
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from cluster.capacity.service_times import ServiceTimes
from mmllm_core.audio import SAMPLE_RATE
from mmllm_core.bundle import Bundle
from tests.serve_apps.conftest import Service, audio_part, data_uri, deploy, image_part, own_serve, wav
from tests.spoken_sentences import recordings

REPEATS = 7
PACKAGES = ("ray", "torch", "transformers", "ctranslate2", "faster-whisper", "open-clip-torch", "numpy")
TOKENS = 48
"""Of an answer, where answers are measured."""
PAUSE_S = 0.7
QUIET: dict[str, Any] = {
    "ui": False,
    "ingress.cache_bytes": 0,
    "clip.cache_bytes": 0,
    "clip.threads": 1,
    "whisper.threads": 1,
    "phi.threads": 1,
}
"""Overrides of the embedded config: a thread for each model, and nothing that was seen is remembered."""
AT_REST = {
    f"{part}.autoscaling": {"min_replicas": 0, "max_replicas": 1, target: 8}
    for part, target in (("clip", "target_images"), ("whisper", "target_seconds"))
} | {"phi.autoscaling": None}


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


@contextmanager
def serving(bundle: Path, overrides: dict[str, Any]) -> Iterator[tuple[Service, float]]:
    """A service of our own, and seconds until it was there."""
    with own_serve() as port:
        began = time.perf_counter()
        service = deploy(Bundle.open(bundle), "mmllm", "/", QUIET | overrides | {"http.port": port})
        yield service, time.perf_counter() - began


async def measure(service: Service, start_s: float, kv_bytes: int) -> dict[str, Any]:
    """Service times of everything, as values of `ServiceTimes`."""
    caller = Caller(service)
    async with httpx.AsyncClient(timeout=None) as client:

        async def one(make: Any, tokens: int = 2) -> Asked:
            return await caller.ask(client, "", make(), tokens)

        async def several(make: Any, tokens: int = 2) -> list[Asked]:
            return [await one(make, tokens) for _ in range(REPEATS)]

        def told(what: str, values: Any) -> None:
            print(what, json.dumps(values), file=sys.stderr, flush=True)

        for words in (8, 100):
            await one(lambda words=words: caller.text(words), 8)
        cold_image, cold_sound = await one(caller.images), await one(caller.sound)
        told("cold", [cold_image.first_s, cold_sound.first_s])

        passing = median([await passed_on(client, service) for _ in range(6 * REPEATS)])
        told("passing", passing)

        prompts = [asked for words in (8, 40, 80, 150) for asked in await several(lambda w=words: caller.text(w))]
        at_once, per_position = _line([(p.prompt_tokens, p.first_s) for p in prompts])
        told("prompt", [at_once, per_position])

        steps = []
        for n in (1, 2, 4, 8):
            for _ in range(3):
                many = await asyncio.gather(*(one(caller.text, TOKENS) for _ in range(n)))
                steps += [(n, (asked.whole_s - asked.first_s) / (TOKENS - 1)) for asked in many]
        per_step, per_answer = _line(steps)
        told("step", [per_step, per_answer])

        def perceived(asked: Asked) -> float:
            return max(0.0, asked.first_s - at_once - per_position * asked.prompt_tokens)

        plain = median(p.prompt_tokens for p in await several(caller.text))
        images = {n: await several(lambda n=n: caller.images(n)) for n in (1, 2, 4, 8)}
        per_batch, per_image = _line([(n, perceived(asked)) for n, found in images.items() for asked in found])
        positions = round((median(a.prompt_tokens for a in images[8]) - plain) / 8)
        told("images", [per_batch, per_image, positions])

        sounds = {n: await several(lambda n=n: caller.sound(n)) for n in (1, 2, 3, 4)}
        lengths = {n: spoken_seconds(n) for n in sounds}
        told("heard", {lengths[n]: [round(perceived(a), 3) for a in found] for n, found in sounds.items()})
        per_clip, per_second = _line([(lengths[n], perceived(asked)) for n, found in sounds.items() for asked in found])
        heard = (median(a.prompt_tokens for a in sounds[4]) - plain) / lengths[4]
        told("sound", [per_clip, per_second, heard])

    one_cpu = {"cpus": 1.0}
    return {
        "ingress": {"hardware": one_cpu, "seconds_per_request": passing},
        "vision": {
            "hardware": one_cpu,
            "start_seconds": cold_image.first_s - median(a.first_s for a in images[1]),
            "seconds_per_batch": max(0.0, per_batch),
            "seconds_per_image": per_image,
        },
        "audio": {
            "hardware": one_cpu,
            "start_seconds": cold_sound.first_s - median(a.first_s for a in sounds[1]),
            "seconds_per_clip": max(0.0, per_clip),
            "seconds_per_second": max(0.0, per_second),
            "tokens_per_second": max(0.0, heard),
        },
        "text": {
            "hardware": one_cpu,
            "start_seconds": start_s,
            "seconds_per_step": per_step,
            "seconds_per_answer": max(0.0, per_answer),
            "seconds_per_position": per_position,
            "positions_per_image": positions,
            "kv_bytes_per_token": kv_bytes,
        },
    }


async def passed_on(client: httpx.AsyncClient, service: Service) -> float:
    """Seconds of a request for which no model does anything."""
    began = time.perf_counter()
    (await client.get(f"{service.base_url}/v1/models")).raise_for_status()
    return time.perf_counter() - began


def kv_bytes_per_token(bundle: Bundle) -> int:
    """Of the bundle's LM as its engine keeps them."""
    import torch

    from mmllm_core.engine.paged_attention import PAGE, page_bytes
    from mmllm_core.engine.step import kv_shape
    from mmllm_core.language import compute_dtype
    from train_jobs.model_shape import read_lm_config

    language = bundle.profile.language
    dtype = getattr(torch, compute_dtype(language.dtype, "cpu"))
    return page_bytes(*kv_shape(read_lm_config(bundle.profile)), dtype) // PAGE


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Offset, at least 0, and slope through the medians at each x."""
    xs = sorted({x for x, _ in points})
    ys = np.array([median(y for x, y in points if x == at) for at in xs])
    slope, offset = np.polyfit(xs, ys, 1)
    if offset < 0:  # nothing takes less than no time
        return 0.0, float(np.dot(xs, ys) / np.dot(xs, xs))
    return float(offset), float(slope)


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


def rounded(values: Any) -> Any:
    """Floats to four digits that count."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.4g}") if isinstance(values, float) else values


def run_measure(bundle: Path, out: Path) -> None:
    """Measure and write."""
    opened = Bundle.open(bundle)
    kv_bytes = kv_bytes_per_token(opened)
    with serving(bundle, AT_REST) as (service, start_s):
        values = provenance(opened) | rounded(asyncio.run(measure(service, start_s, kv_bytes)))
    ServiceTimes.model_validate(values)
    out.write_text(yaml.safe_dump(values, sort_keys=False, width=120), encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def provenance(bundle: Bundle) -> dict[str, Any]:
    """What was measured, where, when, and with which versions."""
    profile = bundle.profile
    models = ", ".join(part.origin.name for part in (profile.vision, profile.audio, profile.language))
    cores = len(os.sched_getaffinity(0))
    return {
        "origin": "measured",
        "where": f"{models}; a thread for each model on {cores} cores of {cpu_name()}, {date.today()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def cpu_name() -> str:
    """The processor as the kernel names it, and whether it computes in bfloat16."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = said.get("flags", "").split()
    knows = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags][:1]
    return " ".join([said.get("model name", platform.machine()), *(f"({name})" for name in knows)])
