"""What `mmllm plan serve` goes by, measured on real Ray Serve, and whether what it predicts comes true there.

    python -m tests.bench.capacity measure --bundle FOLDER [--out times.yaml]
    python -m tests.bench.capacity compare --bundle FOLDER [--times times.yaml] [--rps 0.5 1.0] [--seconds 240]
    python -m tests.bench.capacity check --bundle FOLDER    # both, one after the other
    python -m tests.bench.capacity speed

`measure` asks a service that does nothing else, one part after the other, and writes service times. `compare` sends an
open loop of requests, text, images and speech at random times, to a service of one replica each, and prints seconds to
the first token as measured and as simulated, with their ratio, as JSON, a line a load; exit code 1 if a p95 is more
than 25% off what is predicted for models in turns, or with a core each where this machine has that many. `speed`
simulates every trace at 10,000 requests/s on a thousand replicas of an LM that is assumed to be fast, and prints the
CPU seconds that this takes.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, get_args

import httpx
import numpy as np

from cluster.capacity.changed_config import with_bounds
from cluster.capacity.outcome import Outcome
from cluster.capacity.service_times import ServiceTimes, load_service_times
from cluster.capacity.simulation import PARTS, Shape, Simulation, Way
from cluster.capacity.traces import KINDS, Mix, Trace, TraceName, trace_of
from serve_apps.config_files import load_serve_config
from tests.bench.service_times import QUIET, TOKENS, Asked, Caller, rounded, run_measure, serving, spoken_seconds
from tests.serve_apps.conftest import Service

ALLOWED = 0.25
ALL = ("all", *KINDS)
FIXED = dict.fromkeys(("clip.autoscaling", "whisper.autoscaling", "phi.autoscaling"))


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


def nearest_way() -> Way:
    """Models take turns, unless this machine has a core for each and more for HTTP and for who asks."""
    return "apart" if len(os.sched_getaffinity(0)) > len(PARTS) + 1 else "packed"


def predicted(times: ServiceTimes, rps: float, mix: Mix, prompt_tokens: int, way: Way) -> Outcome:
    """The same load on the same service, simulated for an hour."""
    shape = Shape(prompt_tokens, TOKENS, images=1, audio_seconds=spoken_seconds(1))
    config = load_serve_config("embedded", QUIET | FIXED)
    return Simulation(config, times, Trace("steady", rps, mix, 3600.0), shape, way=way).run()


def run_compare(bundle: Path, times: ServiceTimes, loads: list[float], seconds: float) -> int:
    """Print what was and what was predicted, load by load; 1 if they are too far apart."""
    mix = Mix(1 / 3, 1 / 3, 1 / 3)
    off = []
    with serving(bundle, FIXED) as (service, _):
        for rps in loads:
            asked = asyncio.run(load(service, rps, mix, seconds))
            found = side_by_side(asked, times, rps, mix)
            print(json.dumps(rounded(found)), flush=True)
            off.append(found[nearest_way()]["p95"]["ratio"])
    furthest = max(off, key=lambda ratio: abs(ratio - 1))
    print(json.dumps({"p95_ratio_furthest_from_1": furthest, "p95_ratios": off}))
    return int(abs(furthest - 1) > ALLOWED)


def side_by_side(asked: list[Asked], times: ServiceTimes, rps: float, mix: Mix) -> dict[str, Any]:
    """Seconds to the first token, measured, and predicted with a core for each model and with models in turns."""
    prompt_tokens = int(median(a.prompt_tokens for a in asked if a.kind == "text"))
    found: dict[str, Any] = {"rps": rps, "requests": len(asked), "prompt_tokens": prompt_tokens}
    shares = {"p50": 0.5, "p95": 0.95}
    measured = {
        name: {kind: float(np.quantile([a.first_s for a in asked if kind in ("all", a.kind)], share)) for kind in ALL}
        for name, share in shares.items()
    }
    found["measured"] = measured
    for way in ("apart", "packed"):
        outcome = predicted(times, rps, mix, prompt_tokens, way)
        found[way] = {}
        for name, share in shares.items():
            by_kind = {kind: outcome.ttft(share, None if kind == "all" else kind) or 0.0 for kind in ALL}
            found[way][name] = by_kind | {"ratio": by_kind["all"] / measured[name]["all"]}
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
    parser.add_argument("--out", type=Path, default=Path("times.yaml"))
    parser.add_argument("--times", default="embedded-cpu", help="packaged, or a YAML file")
    parser.add_argument("--rps", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--seconds", type=float, default=240.0)
    arguments = parser.parse_args()
    bundle = arguments.bundle.absolute()
    if arguments.what == "speed":
        sys.exit(run_speed())
    if arguments.what == "check":
        with tempfile.TemporaryDirectory() as folder:
            times = Path(folder) / "times.yaml"
            run_measure(bundle, times)
            sys.exit(run_compare(bundle, load_service_times(str(times)), arguments.rps, arguments.seconds))
    if arguments.what == "measure":
        run_measure(bundle, arguments.out)
    else:
        sys.exit(run_compare(bundle, load_service_times(arguments.times), arguments.rps, arguments.seconds))


if __name__ == "__main__":
    main()
