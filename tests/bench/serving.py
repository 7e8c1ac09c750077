"""A whole service against one process that does the same without a serving system, and against its own engine.

    python -m tests.bench.serving --bundle FOLDER [--plot serving.png]

A mixed load, a third each of text, images and speech, from 16 callers and then from one, on `mmllm serve` and on
`tests.bench.naive_peer`; then text alone on the service and on the bare engine, to tell what HTTP and Serve add. Prints
requests and tokens a second, seconds to the first token, and ratios, as JSON.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.serve_apps.conftest import free_port, recorded_speech
from tests.serve_apps.faults import Ending, MixedLoad, percentile

TOKENS = 32
"""Of every answer."""
CALLERS = 16


@contextmanager
def running(command: list[str], port: int) -> Iterator[str]:
    """A server in processes of its own, from when it is ready."""
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, env=os.environ)
    try:
        end = time.monotonic() + 300
        while True:
            try:
                if httpx.get(f"{url}/readyz", timeout=20).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(command)}: did not become ready")
        yield url
    finally:
        server.terminate()
        server.wait(60)


def mixed(url: str, model: str, n_requests: int, n_callers: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Streamed requests from callers that wait for each answer, after a few that are not counted."""
    speech = recorded_speech()
    warming = MixedLoad(url, model, speech, max_tokens=TOKENS, seed=1, streamed=True, kinds=kinds)
    asyncio.run(warming.closed(2 * len(kinds), n_callers))
    load = MixedLoad(url, model, speech, max_tokens=TOKENS, seed=2, streamed=True, kinds=kinds)
    began = time.monotonic()
    endings = asyncio.run(load.closed(n_requests, n_callers))
    return summary(endings, time.monotonic() - began)


def summary(endings: Sequence[Ending], seconds: float) -> dict[str, Any]:
    """Rates and seconds to the first token."""
    answered = [ending for ending in endings if ending.how == "answered"]
    first = [ending.first_token_s for ending in answered if ending.first_token_s is not None]
    return {
        "requests": len(endings),
        "answered": len(answered),
        "requests_per_second": round(len(answered) / seconds, 3),
        "tokens_per_second": round(TOKENS * len(answered) / seconds, 1),
        "ttft_s_p50": percentile(first, 50),
        "ttft_s_p95": percentile(first, 95),
        "ttft_s_p50_by_kind": {
            kind: percentile([e.first_token_s for e in answered if e.kind == kind and e.first_token_s], 50)
            for kind in dict.fromkeys(ending.kind for ending in endings)
        },
    }


def bare_engine(bundle: Path, n_requests: int, n_callers: int) -> dict[str, Any]:
    """The same text requests on the deployment's own class, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.bare_engine", str(bundle), str(n_requests), str(n_callers)]
    # As Ray gives a replica: the engine's thread has a team of its own, and a second one beside it would slow it down.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Told(dict[str, Any]):
    """Figures that are told as they come, for all of them take a quarter of an hour."""

    def __setitem__(self, name: str, figures: Any) -> None:
        super().__setitem__(name, figures)
        print(name, json.dumps(figures), file=sys.stderr, flush=True)


def measure(bundle: Path, n_requests: int) -> dict[str, Any]:
    """All of it; nothing else runs at the same time as one of them."""
    model = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["name"]
    everything = ("text", "image", "speech")
    found: dict[str, Any] = Told()
    port = free_port()
    with running(["-m", "cluster.cli", "serve", "--bundle", str(bundle), "--port", str(port)], port) as url:
        found["ours"] = mixed(url, model, n_requests, CALLERS, everything)
        found["ours_one_caller"] = mixed(url, model, n_requests // 4, 1, everything)
        found["ours_text"] = mixed(url, model, n_requests, CALLERS, ("text",))
        found["ours_text_one_caller"] = mixed(url, model, n_requests // 4, 1, ("text",))
    port = free_port()
    with running(["-m", "tests.bench.naive_peer", "--bundle", str(bundle), "--port", str(port)], port) as url:
        found["peer"] = mixed(url, model, n_requests // 2, CALLERS, everything)
        found["peer_one_caller"] = mixed(url, model, n_requests // 4, 1, everything)
    found["engine_text"] = bare_engine(bundle, n_requests, CALLERS)
    found["engine_text_one_caller"] = bare_engine(bundle, n_requests // 4, 1)
    found["ratios"] = {
        "requests_per_second_of_the_peer": _ratio(found, "ours", "peer", "requests_per_second"),
        "ttft_p95_of_the_peer": _ratio(found, "ours", "peer", "ttft_s_p95"),
        "tokens_per_second_of_the_engine": _ratio(found, "ours_text", "engine_text", "tokens_per_second"),
        "ttft_ms_over_the_engine": round(
            1000 * (found["ours_text_one_caller"]["ttft_s_p50"] - found["engine_text_one_caller"]["ttft_s_p50"]), 1
        ),
    }
    return found


def _ratio(found: dict[str, Any], one: str, other: str, what: str) -> float:
    return round(found[one][what] / found[other][what], 3)


def plot(found: dict[str, Any], file: Path) -> None:
    """Requests a second and seconds to the first token, side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = {"ours": "mmllm serve", "peer": "one process"}
    for axis, what, title in zip(
        axes,
        ("requests_per_second", "ttft_s_p95"),
        (f"requests/s, {CALLERS} callers (more is better)", "p95 seconds to the first token (less is better)"),
        strict=True,
    ):
        bars = axis.bar(
            [names[way] for way in names], [found[way][what] for way in names], color=["#2a78d6", "#b8b8b8"]
        )
        axis.bar_label(bars, fmt="%.2f")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.bundle.absolute(), arguments.requests)
    if arguments.plot:
        plot(found, arguments.plot)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
