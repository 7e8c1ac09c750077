"""Decoding speed of the engines beside `transformers.generate`, in closed and open loops.

    python -m tests.bench.engines [BUNDLE] [--tokens 64] [--rounds 3] [--concurrent 1 4 8 16 32] [--rates 1 2 4]
        [--seconds 20] [--vllm-python .venv-vllm/bin/python] [--plot engines.png]

All answer the merged LM of a bundle (the last one if none is given), each in a process of its own, in turns and on the
same prompts. Closed loop: so many requests at once, with prompts of 40 to 70 tokens and each for exactly `--tokens`.
Open loop: requests come at random (Poisson) so many a second, whether the others are answered or not, with prompts of
40 to 230 tokens and each for 16 to 112. `generate` has those who wait as a static batch, padded on the left, and shows
nothing before it ends. vLLM takes part if a Python that has it is named (`make test-vllm` makes one). Out: tables of
tokens a second over all requests, the time to the first token and between tokens (p50 and p95), ratios, the same as
JSON, and a plot.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mmllm_core.bundle import Bundle
from mmllm_core.merging import merge_adapter

TOPICS = ["rivers", "the history of bread", "why the sky is blue", "how bees find their way home and tell the others"]
Request = dict[str, Any]


class Worker:
    """A process that answers in one way."""

    def __init__(self, way: str, folder: Path, python: str = sys.executable):
        self.way = way
        command = [python, "-m", "tests.bench.engine_worker", way, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self, requests: list[Request]) -> dict[str, Any]:
        """Have requests answered, and say how long it took."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"{self.way} ended with exit code {self._process.wait()}: see above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


@dataclass
class Measured:
    """Of one way at one load, over rounds."""

    tokens_per_second: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)

    def add(self, requests: list[Request], found: dict[str, Any]) -> None:
        """Take what a worker said."""
        self.tokens_per_second.append(sum(r["n"] for r in requests) / found["seconds"])
        self.first_s += found["first"]
        self.between_s += found["between"]

    @property
    def speed(self) -> float:
        """Median over rounds."""
        return statistics.median(self.tokens_per_second)

    def as_json(self, others: "dict[str, Measured]") -> dict[str, Any]:
        """Figures of a table's row, and how many times as fast this is as each of the others at the same load."""
        return {f"of_{way}": self.speed / other.speed for way, other in others.items() if other is not self} | {
            "median_tokens_per_s": self.speed,
            "tokens_per_second": self.tokens_per_second,
            "first_token_s_p50_p95": _percentiles(self.first_s),
            "between_tokens_s_p50_p95": _percentiles(self.between_s),
        }


def _percentiles(seconds: list[float]) -> list[float]:
    return np.percentile(seconds, [50, 95]).tolist() if seconds else []


def prompts_of(tokenizer: Any, n: int, salt: str, longest: int) -> list[list[int]]:
    """Prompts of one to `longest` sentences, none of which was asked before."""
    found = []
    for i in range(n):
        text = f"Request {salt}-{i}. " + " ".join([f"Tell me about {TOPICS[i % len(TOPICS)]}."] * (1 + 3 * i % longest))
        found.append(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True))
    return [ids if isinstance(ids, list) else ids["input_ids"] for ids in found]


def closed(tokenizer: Any, n: int, n_tokens: int, salt: str) -> list[Request]:
    """Requests that come together."""
    return [{"ids": ids, "n": n_tokens, "at": 0.0} for ids in prompts_of(tokenizer, n, salt, 4)]


def poisson(tokenizer: Any, rate: float, seconds: float, salt: str) -> list[Request]:
    """Requests that come at random, `rate` a second."""
    rng = random.Random(salt)
    times: list[float] = []
    while (at := (times[-1] if times else 0.0) + rng.expovariate(rate)) < seconds:
        times.append(at)
    prompts = prompts_of(tokenizer, len(times), salt, 16)
    return [{"ids": ids, "n": rng.randrange(16, 113), "at": at} for ids, at in zip(prompts, times, strict=True)]


def show(title: str, first_column: str, loads: dict[str, dict[str, Measured]]) -> None:
    """Print a table: loads by way."""
    table = Table(
        first_column, "way", "tokens/s", "of generate", "first token p50, p95", "between p50, p95", title=title
    )
    for load, ways in loads.items():
        for way, found in ways.items():
            waits = [", ".join(f"{1000 * x:.0f} ms" for x in _percentiles(w)) for w in (found.first_s, found.between_s)]
            ratio = found.speed / ways["generate"].speed
            table.add_row(load, way, f"{found.speed:.1f}", f"{ratio:.2f}", *waits)
        table.add_section()
    Console(width=110).print(table)


def plot(together: dict[str, dict[str, Measured]], coming: dict[str, dict[str, Measured]], path: Path) -> None:
    """Speed against requests at a time, and waiting against requests a second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, wait = figure.subplots(1, 2)
    for axes, loads, value in (
        (speed, together, lambda found: found.speed),
        (wait, coming, lambda found: np.percentile(found.first_s, 50)),
    ):
        for way in next(iter(loads.values()), {}):
            axes.plot(list(loads), [value(ways[way]) for ways in loads.values()], marker="o", label=way)
        axes.grid(alpha=0.3)
    speed.set(xlabel="requests at a time", ylabel="tokens/s over all", ylim=(0, None))
    wait.set(xlabel="requests a second", ylabel="seconds to the first token (p50)", yscale="log")
    speed.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrent", type=int, nargs="*", default=[1, 4, 8, 16, 32])
    parser.add_argument("--rates", type=float, nargs="*", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--vllm-python", help="a Python with vLLM, which then takes part")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()

    bundle = Bundle.open(options.bundle) if options.bundle else Bundle.latest()
    tokenizer = bundle.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        lm = bundle.load_model().lm
        merge_adapter(lm, lm.get_input_embeddings().weight.dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del lm
        workers = [Worker(way, Path(folder)) for way in ("generate", "transformers")]
        if options.vllm_python:
            workers.append(Worker("vllm", Path(folder), options.vllm_python))
        together: dict[str, dict[str, Measured]] = {}
        coming: dict[str, dict[str, Measured]] = {}
        for i in range(options.rounds + 1):
            for n in options.concurrent:
                requests = closed(tokenizer, n, options.tokens, f"{i}")
                for worker in workers:
                    found = worker.answer(requests)
                    if i > 0:  # the first round warms up
                        together.setdefault(str(n), {}).setdefault(worker.way, Measured()).add(requests, found)
        for rate in options.rates:
            requests = poisson(tokenizer, rate, options.seconds, f"rate {rate:g}")
            for worker in workers:
                coming.setdefault(f"{rate:g}", {}).setdefault(worker.way, Measured()).add(
                    requests, worker.answer(requests)
                )
        for worker in workers:
            worker.close()

    show(f"So many requests at once, {options.tokens} tokens each", "requests", together)
    show(f"So many requests a second, at random, for {options.seconds:g} s", "a second", coming)
    result = {
        "lm": bundle.info.profile.language.model_dump(mode="json"),
        "tokens": options.tokens,
        "closed": {n: {way: found.as_json(ways) for way, found in ways.items()} for n, ways in together.items()},
        "open": {rate: {way: found.as_json(ways) for way, found in ways.items()} for rate, ways in coming.items()},
        "machine": platform.processor() or platform.machine(),
    }
    if options.plot:
        plot(together, coming, options.plot)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
