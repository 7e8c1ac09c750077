"""How long each part of a request takes, measured on a service that does nothing else, one part after the other.

In: a bundle. Out: a YAML file of `cluster.capacity.service_times`. `python -m tests.bench.capacity measure` runs it.
"""

import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import yaml

from cluster.capacity.service_times import ServiceTimes
from cluster.capacity.simulation import Way
from mmllm_core.bundle import Bundle
from tests.bench.caller import Asked, Caller, spoken_seconds
from tests.bench.cpu_limits import limited, share_of_a_core
from tests.serve_apps.conftest import Service, deploy, own_serve

REPEATS = 5
PACKAGES = ("ray", "torch", "transformers", "ctranslate2", "faster-whisper", "open-clip-torch", "numpy")
TOKENS = 48
"""Of an answer, where answers are measured."""
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


@contextmanager
def serving(bundle: Path, overrides: dict[str, Any]) -> Iterator[tuple[Service, float]]:
    """A service of our own, and seconds until it was there."""
    with own_serve() as port:
        began = time.perf_counter()
        service = deploy(Bundle.open(bundle), "mmllm", "/", QUIET | overrides | {"http.port": port})
        yield service, time.perf_counter() - began


async def measure(service: Service, start_s: float, kv_bytes: int, way: Way, limits: ExitStack) -> dict[str, Any]:
    """Service times of everything, as values of `ServiceTimes`.

    Args:
        way: in which models have cores once they have started; `limits` holds it.
    """
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
        limits.enter_context(limited(way))

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

    of_model = {"cpus": share_of_a_core() if way == "apart" else 1.0}
    return {
        "ingress": {"hardware": {"cpus": 1.0}, "seconds_per_request": passing},
        "vision": {
            "hardware": of_model,
            "start_seconds": cold_image.first_s - median(a.first_s for a in images[1]),
            "seconds_per_batch": max(0.0, per_batch),
            "seconds_per_image": per_image,
        },
        "audio": {
            "hardware": of_model,
            "start_seconds": cold_sound.first_s - median(a.first_s for a in sounds[1]),
            "seconds_per_clip": max(0.0, per_clip),
            "seconds_per_second": max(0.0, per_second),
            "tokens_per_second": max(0.0, heard),
        },
        "text": {
            "hardware": of_model,
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


def rounded(values: Any) -> Any:
    """Floats to four digits that count."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.4g}") if isinstance(values, float) else values


@contextmanager
def measured(bundle: Path, way: Way, out: Path) -> Iterator[tuple[Service, ServiceTimes]]:
    """A service whose times were measured and written, and which still has its cores in that way."""
    opened = Bundle.open(bundle)
    kv_bytes = kv_bytes_per_token(opened)
    with serving(bundle, AT_REST) as (service, start_s), ExitStack() as limits:
        values = rounded(asyncio.run(measure(service, start_s, kv_bytes, way, limits)))
        values = provenance(opened, values["text"]["hardware"]["cpus"]) | values
        times = ServiceTimes.model_validate(values)
        out.write_text(yaml.safe_dump(values, sort_keys=False, width=120), encoding="utf-8")
        print(out.read_text(encoding="utf-8"))
        yield service, times


def provenance(bundle: Bundle, cpus: float) -> dict[str, Any]:
    """What was measured, where, when, and with which versions."""
    profile = bundle.profile
    models = ", ".join(part.origin.name for part in (profile.vision, profile.audio, profile.language))
    cores = len(os.sched_getaffinity(0))
    return {
        "origin": "measured",
        "where": f"{models}; a thread for each model, on {cpus:g} of {cores} cores of {cpu_name()}, {date.today()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def cpu_name() -> str:
    """The processor as the kernel names it, and whether it computes in bfloat16."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = said.get("flags", "").split()
    knows = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags][:1]
    return " ".join([said.get("model name", platform.machine()), *(f"({name})" for name in knows)])
