"""What `mmllm plan serve` goes by, measured on real Ray Serve, and whether what it predicts comes true there.

    python -m tests.bench.capacity measure --bundle FOLDER [--way packed] [--out times.yaml]
    python -m tests.bench.capacity compare --bundle FOLDER --times times.yaml [--way packed] [--rps 1] [--seconds 150]
    python -m tests.bench.capacity check --bundle FOLDER [--way packed]    # both, on one service
    python -m tests.bench.capacity speed

`measure` asks a service that does nothing else, one part after the other, and writes service times. `compare` sends an
open loop of requests, text, images and speech at random times, to a service of one replica each, and prints seconds to
the first token as measured and as simulated, with their ratio, as JSON, a line a run; exit code 1 if a p95 is more than
25% off. Both limit the models to the cores that are simulated (`tests.bench.cpu_limits`): `packed`, all three in turns
on one core; `apart`, each on a core for itself, or where this machine has too few for that on half a one, and service
times are those of half a core then. HTTP and who asks have what is left. `speed` simulates every trace at 10,000
requests/s on a thousand replicas of an LM that is assumed to be fast, and prints the CPU seconds that this takes.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

import httpx
import numpy as np

from cluster.capacity.changed_config import with_bounds
from cluster.capacity.outcome import Outcome
from cluster.capacity.service_times import ServiceTimes, load_service_times
from cluster.capacity.simulation import Shape, Simulation, Way
from cluster.capacity.traces import KINDS, Mix, Trace, TraceName, trace_of
from serve_apps.config_files import load_serve_config
from tests.bench.caller import Asked, Caller, spoken_seconds
from tests.bench.cpu_limits import CoresUsed, limited
from tests.bench.service_times import QUIET, measured, rounded, serving
from tests.serve_apps.conftest import Service

ALLOWED = 0.25
ALL = ("all", *KINDS)
FIXED = dict.fromkeys(("clip.autoscaling", "whisper.autoscaling", "phi.autoscaling"))
ANSWER = 8
"""Tokens: short, for many requests to be asked within minutes."""
RPS = 1.0
"""Where models have a core."""


@dataclass(frozen=True)
class Runs:
    """What `compare` sends."""

    rps: float | None
    seconds: float
    seeds: list[int]


async def load(service: Service, rps: float, mix: Mix, seconds: float, seed: int) -> list[Asked]:
    """Requests at random times, whatever becomes of those before them."""
    caller, chance = Caller(service), np.random.default_rng(seed)
    dues, due = [], 0.0
    while (due := due + chance.exponential(1 / rps)) < seconds:
        kind = str(chance.choice(KINDS, p=mix.shares))
        dues.append((due, kind, caller.content(kind)))  # made before: who asks computes little meanwhile
    waiting = []
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        for kind in (*KINDS, *KINDS):  # what runs for the first time is not counted
            await caller.ask(client, kind, caller.content(kind), 2)
        began = time.perf_counter()
        for due, kind, content in dues:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            waiting.append(asyncio.create_task(caller.ask(client, kind, content, ANSWER)))
        return await asyncio.gather(*waiting)


def predicted(times: ServiceTimes, rps: float, mix: Mix, prompt_tokens: int, way: Way) -> Outcome:
    """The same load on the same service, simulated for an hour."""
    shape = Shape(prompt_tokens, ANSWER, images=1, audio_seconds=spoken_seconds(1))
    config = load_serve_config("embedded", QUIET | FIXED)
    return Simulation(config, times, Trace("steady", rps, mix, 3600.0), shape, way=way).run()


def compared(service: Service, times: ServiceTimes, way: Way, runs: Runs) -> int:
    """Print what was and what was predicted, run by run; 1 if they are too far apart. The cores are limited already."""
    mix = Mix(1 / 3, 1 / 3, 1 / 3)
    rps = runs.rps or RPS * times.text.hardware.cpus
    ratios = []
    for seed in runs.seeds:
        used = CoresUsed()
        asked = asyncio.run(load(service, rps, mix, runs.seconds, seed))
        found = {"way": way, "seed": seed, "cores_used": used.told()} | side_by_side(asked, times, rps, mix, way)
        print(json.dumps(rounded(found)), flush=True)
        ratios.append(found["p95_ratio"])
    furthest = max(ratios, key=lambda ratio: abs(ratio - 1))
    print(json.dumps({"p95_ratio_furthest_from_1": furthest, "p95_ratios": ratios}))
    return int(abs(furthest - 1) > ALLOWED)


def side_by_side(asked: list[Asked], times: ServiceTimes, rps: float, mix: Mix, way: Way) -> dict[str, Any]:
    """Seconds to the first token, measured and predicted."""
    prompt_tokens = int(median(a.prompt_tokens for a in asked if a.kind == "text"))
    outcome = predicted(times, rps, mix, prompt_tokens, way)
    found: dict[str, Any] = {"rps": rps, "requests": len(asked), "prompt_tokens": prompt_tokens}
    for name, share in {"p50": 0.5, "p95": 0.95}.items():
        was = {kind: float(np.quantile([a.first_s for a in asked if kind in ("all", a.kind)], share)) for kind in ALL}
        will = {kind: outcome.ttft(share, None if kind == "all" else kind) or 0.0 for kind in ALL}
        found[name] = {"measured": was, "predicted": will}
        found[f"{name}_ratio"] = will["all"] / was["all"]
    return found


def run_speed() -> int:
    """Print CPU seconds of each trace; 1 if one takes a minute."""
    times = load_service_times("embedded-cpu")
    fast = {"seconds_per_step": 0.004, "seconds_per_answer": 0.0002, "seconds_per_position": 0.00002}
    times = times.model_copy(update={"text": times.text.model_copy(update=fast)})
    config = with_bounds(load_serve_config("embedded"), 2_000)
    took = {}
    for name in get_args(TraceName):
        began = time.process_time()
        found = Simulation(config, times, trace_of(name, 10_000.0, Mix(0.6, 0.3, 0.1)), Shape()).run()
        took[name] = {
            "cpu_seconds": time.process_time() - began,
            "requests": found.arrived,
            "mean_replicas": {part: float(counts.mean()) for part, counts in found.replicas.items()},
            "peak_replicas": {part: float(counts.max()) for part, counts in found.replicas.items()},
        }
        print(name, json.dumps(rounded(took[name])), flush=True)
    most = max(one["cpu_seconds"] for one in took.values())
    replicas = max(sum(one["peak_replicas"].values()) for one in took.values())
    print(json.dumps({"most_cpu_seconds": most, "most_replicas": replicas}))
    return int(most >= 60)


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "compare", "check", "speed"])
    parser.add_argument("--bundle", type=Path, default=Path())
    parser.add_argument("--way", choices=["packed", "apart"], default="packed")
    parser.add_argument("--out", type=Path, default=Path("times.yaml"))
    parser.add_argument("--times", default="embedded-cpu", help="packaged, or a YAML file")
    parser.add_argument(
        "--rps", type=float, help=f"of a run; {RPS:g} by default, less where models have less of a core"
    )
    parser.add_argument("--seconds", type=float, default=150.0, help="of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12], help="a run with each")
    arguments = parser.parse_args()
    bundle, way = arguments.bundle.absolute(), arguments.way
    runs = Runs(arguments.rps, arguments.seconds, arguments.seeds)
    if arguments.what == "speed":
        sys.exit(run_speed())
    if arguments.what == "measure":
        with measured(bundle, way, arguments.out):
            return
    if arguments.what == "check":
        with measured(bundle, way, arguments.out) as (service, times):
            sys.exit(compared(service, times, way, runs))
    with serving(bundle, FIXED) as (service, _), limited(way):
        sys.exit(compared(service, load_service_times(arguments.times), way, runs))


if __name__ == "__main__":
    main()
