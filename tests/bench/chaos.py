"""What becomes of requests while the service is overloaded, killed part by part, redeployed and left by its callers.

    python -m tests.bench.chaos [--requests 500] [--seconds 12] [--rounds 5]

On real Ray Serve with tiny models and two replicas of every part. Prints a table and JSON: how requests ended under ten
times the load that the service can take, and its memory; while replicas are killed without a warning; while it is
redeployed; and how soon the LM is free again after a caller hangs up.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from serve_apps.builder import CLIP, INGRESS, PHI, WHISPER
from tests.serve_apps.conftest import Proxy, Service, build_tiny_bundle, deploy, own_serve, recorded_speech
from tests.serve_apps.faults import Ending, MixedLoad, kill_now_and_then, memory_mb, percentile

BEHIND = [CLIP, WHISPER, PHI]
CONFIG: dict[str, Any] = {
    "ui": False,
    "limits.request_timeout_s": 60,
    "ingress.num_replicas": 2,
    "clip.threads": 1,
    "whisper.threads": 1,
    "phi.threads": 1,
    "phi.kv_cache_bytes": 60_000_000,
} | {
    f"{part}.{key}": value
    for part in ("clip", "whisper", "phi")
    for key, value in {
        "autoscaling": None,
        "num_replicas": 2,
        "max_queued_requests": 16,
    }.items()
}


@contextmanager
def service(proxy: Proxy = "serve") -> Iterator[tuple[Service, Callable[..., Service]]]:
    """A service of our own, and what deploys it with other settings."""
    # As many CPUs as replicas ask for; two cores do for tiny models.
    with tempfile.TemporaryDirectory() as folder, own_serve(num_cpus=16, proxy=proxy) as port:
        bundle = build_tiny_bundle(Path(folder))

        def deploy_with(**overrides: Any) -> Service:
            return deploy(bundle, "mmllm", "/", CONFIG | {"http.port": port} | overrides)

        yield deploy_with(), deploy_with


async def overload(load: MixedLoad, times: float, seconds: float, n_rounds: int) -> dict[str, Any]:
    """More than the service can take, again and again, to see whether memory grows."""
    began = time.monotonic()
    rate = len(await load.closed(96, 16)) / (time.monotonic() - began)
    memory = [memory_mb([INGRESS, *BEHIND])]
    rounds = []
    for _ in range(n_rounds):
        load.endings = []
        rounds += await load.open(times * rate, seconds)
        memory.append(memory_mb([INGRESS, *BEHIND]))
    refused = [ending for ending in rounds if ending.how == "429"]
    return {
        "requests_per_second": round(rate, 2),
        "offered_per_second": round(times * rate, 2),
        "endings": endings(rounds),
        "sent": len(rounds),
        "otherwise": sum(ending.how not in ("answered", "429") for ending in rounds),
        "refused_with_retry_after": sum(ending.retry_after is not None for ending in refused),
        "refused_in_s_p95": percentile([ending.seconds for ending in refused], 95),
        "answered_in_s_p95": percentile([ending.seconds for ending in rounds if ending.how == "answered"], 95),
        "memory_mb": memory,
    }


async def kills(load: MixedLoad, app: str, n_requests: int, deployments: list[str]) -> dict[str, Any]:
    """Requests while replicas die."""
    load.endings = []
    killed = await kill_now_and_then(app, deployments, load.closed(n_requests, 8))
    return {"killed": dict(killed), "endings": endings(load.endings)} | shares(load.endings)


async def redeploy(load: MixedLoad, deploy_with: Callable[..., Service]) -> dict[str, Any]:
    """Requests while every replica is replaced, since a setting changed."""
    load.endings = []
    done = asyncio.create_task(asyncio.to_thread(deploy_with, **{"limits.max_images": 4}))
    while not done.done():
        await load.closed(24, 8)
    await done
    await load.closed(24, 8)
    return {"endings": endings(load.endings)} | shares(load.endings)


async def hang_up(target: Service, times: int) -> dict[str, Any]:
    """How long the LM goes on after a caller left a stream."""
    from ray import serve

    phi = serve.get_deployment_handle(PHI, target.app_name)
    seconds = []
    for _ in range(times):
        async with httpx.AsyncClient(timeout=30) as client:
            body = target.body("Tell me of rivers.", stream=True) | {"max_tokens": 1500, "min_tokens": 1500}
            async with client.stream("POST", f"{target.base_url}/v1/chat/completions", json=body) as reply:
                async for line in reply.aiter_lines():
                    if '"content":' in line:
                        break
        left = time.monotonic()
        while (await phi.load.remote()).running or (await phi.load.remote()).running:  # of two replicas, most likely
            await asyncio.sleep(0.02)
        seconds.append(time.monotonic() - left)
    return {"times": times, "freed_in_s_p50": percentile(seconds, 50), "freed_in_s_most": round(max(seconds), 3)}


def endings(found: Sequence[Ending]) -> dict[str, int]:
    """How often requests ended how."""
    return dict(Counter(ending.how for ending in found).most_common())


def shares(found: Sequence[Ending]) -> dict[str, float]:
    """How many were answered, and how many ended so that their caller cannot tell."""
    return {
        "answered_share": sum(ending.how == "answered" for ending in found) / len(found),
        "unnoticed": sum(ending.how in ("silent", "hung") for ending in found),
    }


async def measure(n_requests: int, seconds: float, n_rounds: int) -> dict[str, Any]:
    """All of it, one after another."""
    with service() as (target, deploy_with):
        load = MixedLoad(target.base_url, target.model, recorded_speech())
        retrying = replace(load, retries=2, endings=[])
        app = target.app_name
        return {
            "overload": await overload(load, 10, seconds, n_rounds),
            "kills_behind_the_ingress": await kills(load, app, n_requests, BEHIND),
            "kills_of_the_ingress": await kills(load, app, n_requests // 5, [INGRESS]),
            "kills_of_the_ingress_where_clients_retry": await kills(retrying, app, n_requests // 5, [INGRESS]),
            "redeploy": await redeploy(load, deploy_with),
            "hang_up": await hang_up(target, 10),
        }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="while replicas are killed")
    parser.add_argument("--seconds", type=float, default=12, help="of each round of ten times the load")
    parser.add_argument("--rounds", type=int, default=5, help="of ten times the load")
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments.requests, arguments.seconds, arguments.rounds))
    table = Table("what was done", "how requests ended", "what else was seen")
    for name, values in found.items():
        ends = ", ".join(f"{count} {how}" for how, count in values.get("endings", {}).items())
        table.add_row(name.replace("_", " "), ends, ", ".join(f"{k} {v}" for k, v in values.items() if k != "endings"))
    Console(stderr=True).print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
