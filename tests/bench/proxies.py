"""What HTTP and Serve take beside the bare engine, behind Serve's own proxy and behind HAProxy, in turns.

    python -m tests.bench.proxies --bundle FOLDER [--rounds 3] [--requests 48]

Each round runs the bare engine, then `mmllm serve` behind each proxy, on streamed texts from 16 callers and then from
one. Prints of each the tokens a second, the CPU seconds that a request takes (the callers' own are in the bare engine's
and not in the services'), seconds to the first token, and, as medians over the rounds, how these stand to the bare
engine's of the same round; as JSON. Linux.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.bench.serving import CALLERS, Told, bare_engine, mixed, running
from tests.serve_apps.conftest import free_port

PROXIES = ("serve", "haproxy")
ONE_CALLERS = 12
"""Requests of the one caller."""


def cpu_seconds(families: list[psutil.Process]) -> float:
    """That processes and all that they started have taken so far."""
    taken = 0.0
    for process in [each for family in families for each in (family, *family.children(recursive=True))]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        taken += times.user + times.system
    return taken


@contextmanager
def service(bundle: Path, proxy: str) -> Iterator[tuple[str, list[psutil.Process]]]:
    """`mmllm serve` behind a proxy: its URL, and its processes."""
    port, before = free_port(), set(psutil.Process().children())
    command = ["-m", "cluster.cli", "serve", "--bundle", str(bundle), "--port", str(port), "--proxy", proxy]
    with running(command, port) as url:
        yield url, [child for child in psutil.Process().children() if child not in before]


def measure(bundle: Path, proxy: str, n_requests: int) -> dict[str, Any]:
    """A service behind a proxy."""
    model = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["name"]
    with service(bundle, proxy) as (url, processes):
        mixed(url, model, CALLERS, CALLERS, ("text",))
        before = cpu_seconds(processes)
        crowd = mixed(url, model, n_requests, CALLERS, ("text",))
        taken = cpu_seconds(processes) - before
        alone = mixed(url, model, ONE_CALLERS, 1, ("text",))
    return _told(crowd, alone, taken / (n_requests + 2))  # two more warm it


def _told(crowd: dict[str, Any], alone: dict[str, Any], cpu_s_per_request: float) -> dict[str, Any]:
    return {
        "tokens_per_second": crowd["tokens_per_second"],
        "cpu_s_per_request": round(cpu_s_per_request, 4),
        "ttft_s_p50_one_caller": alone["ttft_s_p50"],
        "answered": crowd["answered"] + alone["answered"],
    }


def bare(bundle: Path, n_requests: int) -> dict[str, Any]:
    """The bare engine."""
    crowd = bare_engine(bundle, n_requests, CALLERS)
    return _told(crowd, bare_engine(bundle, ONE_CALLERS, 1), crowd["cpu_s_per_request"])


def compared(rounds: list[dict[str, Any]], proxy: str) -> dict[str, float]:
    """How a proxy's figures stand to the bare engine's: medians over the rounds."""
    pairs = [(each[proxy], each["engine"]) for each in rounds]
    return {
        "of_the_engines_tokens_per_second": round(
            statistics.median(ours["tokens_per_second"] / engine["tokens_per_second"] for ours, engine in pairs), 3
        ),
        "of_the_engines_cpu_s_per_request": round(
            statistics.median(ours["cpu_s_per_request"] / engine["cpu_s_per_request"] for ours, engine in pairs), 3
        ),
        "ttft_ms_over_the_engine": round(
            statistics.median(
                1000 * (ours["ttft_s_p50_one_caller"] - engine["ttft_s_p50_one_caller"]) for ours, engine in pairs
            ),
            1,
        ),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=48)
    arguments = parser.parse_args()
    if sys.platform != "linux":
        parser.error("HAProxy comes with Ray on Linux alone")
    bundle, rounds = arguments.bundle.absolute(), []
    for _ in range(arguments.rounds):
        each: dict[str, Any] = Told()
        each["engine"] = bare(bundle, arguments.requests)
        for proxy in PROXIES:
            each[proxy] = measure(bundle, proxy, arguments.requests)
        rounds.append(each)
    print(json.dumps({proxy: compared(rounds, proxy) for proxy in PROXIES} | {"rounds": rounds}))


if __name__ == "__main__":
    main()
