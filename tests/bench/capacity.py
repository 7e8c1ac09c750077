"""What `mmllm plan serve` goes by, measured on real Ray Serve, and whether what it predicts comes true there.

    python -m tests.bench.capacity measure --bundle FOLDER [--out times.yaml]
    python -m tests.bench.capacity compare --bundle FOLDER [--times times.yaml] [--rps 0.5] [--seconds 300]
    python -m tests.bench.capacity speed

`measure` asks a service that does nothing else, one part after the other, and writes service times. `compare` sends an
open loop of requests, text, images and speech at random times, to a service of one replica each, and prints seconds to
the first token as measured and as simulated, with their ratio, as JSON; exit code 1 if p95 is more than 25% off. `speed`
simulates every trace at 10,000 requests/s on the thousand replicas that they take where the LM is assumed to be fast, and
prints the CPU seconds that this takes.
"""

import argparse
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
from pathlib import Path
from statistics import median
from typing import Any, get_args

import httpx
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from cluster.capacity.service_times import ServiceTimes, load_service_times
from cluster.capacity.simulation import Outcome, Shape, Simulation, with_bounds
from cluster.capacity.traces import KINDS, Mix, Trace, TraceName, trace_of
from mmllm_core.audio import SAMPLE_RATE, decode_audio
from mmllm_core.bundle import Bundle
from serve_apps.builder import load_serve_config
from tests.serve_apps.conftest import Service, audio_part, data_uri, deploy, image_part, own_serve, recorded_speech, wav

ALLOWED = 0.25
REPEATS = 7
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
FIXED = dict.fromkeys(("clip.autoscaling", "whisper.autoscaling", "phi.autoscaling"))


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
        """A sentence, or as many with a pause between them."""
        return [audio_part(wav(spoken(sentences))), {"type": "text", "text": self.text()}]

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


async def measure(service: Service, start_s: float, kv_bytes: int, where: str) -> dict[str, Any]:
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
        lengths = {n: len(spoken(n)) / SAMPLE_RATE for n in sounds}
        told("heard", {lengths[n]: [round(perceived(a), 3) for a in found] for n, found in sounds.items()})
        per_clip, per_second = _line([(lengths[n], perceived(asked)) for n, found in sounds.items() for asked in found])
        heard = (median(a.prompt_tokens for a in sounds[4]) - plain) / lengths[4]
        told("sound", [per_clip, per_second, heard])

    one_cpu = {"cpus": 1.0}
    return {
        "origin": "measured",
        "where": where,
        "ingress": {"hardware": one_cpu, "seconds_per_request": max(0.0, at_once - per_step - per_answer)},
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


@cache
def spoken(sentences: int) -> NDArray[np.float32]:
    """Samples (n,) of a sentence, said so often."""
    one = decode_audio(recorded_speech(), 60)
    pause = np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
    return np.concatenate([one, *[pause, one] * (sentences - 1)])


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
    cores = len(os.sched_getaffinity(0))
    where = f"bundle '{opened.info.name}', a thread for each model on {cores} CPU cores ({_cpu()}), {date.today()}"
    kv_bytes = kv_bytes_per_token(opened)
    with serving(bundle, AT_REST) as (service, start_s):
        values = rounded(asyncio.run(measure(service, start_s, kv_bytes, where)))
    ServiceTimes.model_validate(values)
    out.write_text(yaml.safe_dump(values, sort_keys=False, width=120), encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


async def load(service: Service, rps: float, mix: Mix, seconds: float) -> list[Asked]:
    """Requests at random times, whatever becomes of those before them."""
    caller, chance = Caller(service), np.random.default_rng(11)
    waiting = []
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        for kind in (*KINDS, *KINDS):  # what runs for the first time is not counted
            await caller.ask(client, kind, caller.content(kind), 2)
        began = due = time.perf_counter()
        while (due := due + chance.exponential(1 / rps)) < began + seconds:
            kind = str(chance.choice(KINDS, p=mix.shares))
            content = caller.content(kind)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            waiting.append(asyncio.create_task(caller.ask(client, kind, content, TOKENS)))
        return await asyncio.gather(*waiting)


def predicted(times: ServiceTimes, rps: float, mix: Mix, prompt_tokens: int) -> Outcome:
    """The same load on the same service, simulated for an hour."""
    shape = Shape(prompt_tokens, TOKENS, images=1, audio_seconds=len(spoken(1)) / SAMPLE_RATE)
    config = load_serve_config("embedded", QUIET | FIXED)
    return Simulation(config, times, Trace("steady", rps, mix, 3600.0), shape).run()


def run_compare(bundle: Path, times: ServiceTimes, rps: float, seconds: float) -> int:
    """Print what was and what was predicted; 1 if they are too far apart."""
    mix = Mix(1 / 3, 1 / 3, 1 / 3)
    with serving(bundle, FIXED) as (service, _):
        asked = asyncio.run(load(service, rps, mix, seconds))
    prompt_tokens = int(median(a.prompt_tokens for a in asked if a.kind == "text"))
    outcome = predicted(times, rps, mix, prompt_tokens)
    found: dict[str, Any] = {"rps": rps, "requests": len(asked), "prompt_tokens": prompt_tokens}
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        measured = float(np.quantile([a.first_s for a in asked], share))
        simulated = outcome.ttft(share) or 0.0
        by_kind = {
            kind: [
                float(np.quantile([a.first_s for a in asked if a.kind == kind], share)),
                outcome.ttft(share, kind),
            ]
            for kind in KINDS
        }
        found[name] = {"measured": measured, "predicted": simulated, "ratio": simulated / measured, "kinds": by_kind}
    print(json.dumps(rounded(found)))
    return int(abs(found["p95"]["ratio"] - 1) > ALLOWED)


def run_speed() -> int:
    """Print CPU seconds of each trace; 1 if one takes a minute."""
    times = load_service_times("embedded-cpu")
    fast = {"seconds_per_step": 0.012, "seconds_per_answer": 0.0005, "seconds_per_position": 0.00002}
    times = times.model_copy(update={"text": times.text.model_copy(update=fast)})
    config = with_bounds(load_serve_config("embedded"), 2_000)
    took = {}
    for name in get_args(TraceName):
        began = time.process_time()
        found = Simulation(config, times, trace_of(name, 10_000.0, Mix(0.6, 0.3, 0.1)), Shape(120, 60)).run()
        took[name] = {
            "cpu_seconds": time.process_time() - began,
            "requests": found.arrived,
            "peak_replicas": {part: float(counts.max()) for part, counts in found.replicas.items()},
        }
        print(name, json.dumps(rounded(took[name])), flush=True)
    return int(max(one["cpu_seconds"] for one in took.values()) >= 60)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "compare", "speed"])
    parser.add_argument("--bundle", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path("times.yaml"))
    parser.add_argument("--times", default="embedded-cpu", help="packaged, or a YAML file")
    parser.add_argument("--rps", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=300.0)
    arguments = parser.parse_args()
    bundle = arguments.bundle.absolute()
    if arguments.what == "speed":
        sys.exit(run_speed())
    if arguments.what == "measure":
        run_measure(bundle, arguments.out)
    else:
        sys.exit(run_compare(bundle, load_service_times(arguments.times), arguments.rps, arguments.seconds))


if __name__ == "__main__":
    main()
