"""Decoding speed of the engine beside `transformers.generate`, at several numbers of requests at a time.

    python -m tests.bench.engines [BUNDLE] [--tokens 64] [--rounds 3] [--concurrent 1 4 8 16 32] [--out DIR]

Both run the merged LM of a bundle (the last one if none is given) in one process, in turns, on prompts of mixed
lengths, and give exactly so many tokens each. `generate` has each group as one static batch, padded on the left; the
engine gets as many requests at once. Out: a table of tokens a second over all requests, the engine's time to the first
token and between tokens (p50 and p95), ratios, the same as JSON, and a plot in DIR.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mmllm_core.bundle import Bundle
from mmllm_core.engine.protocol import EngineRequest, SamplingParams
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.merging import merge_language_model
from tests.bench.bench_merged_lm import tokens_per_second

TOPICS = ["rivers", "the history of bread", "why the sky is blue", "how bees find their way home and tell the others"]


@dataclass
class Measured:
    """Of one number of requests at a time."""

    tokens_per_second: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    between_tokens_s: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Median over rounds."""
        return statistics.median(self.tokens_per_second)


def prompts_of(tokenizer: Any, n: int, salt: int) -> list[list[int]]:
    """Prompts of mixed lengths, none of which was asked before."""
    found = []
    for i in range(n):
        text = f"Request {salt}-{i}. " + " ".join([f"Tell me about {TOPICS[i % len(TOPICS)]}."] * (1 + i % 4))
        found.append(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True))
    return [ids if isinstance(ids, list) else ids["input_ids"] for ids in found]


def generate(lm: Any, prompts: list[list[int]], n_tokens: int) -> float:
    """Tokens a second of a static batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])  # (b, t)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return tokens_per_second(lm, ids, n_tokens, mask)


async def complete(engine: TransformersEngine, prompts: list[list[int]], n_tokens: int, measured: Measured) -> None:
    """Ask all at once."""

    async def ask(i: int, ids: list[int]) -> None:
        sampling = SamplingParams(max_tokens=n_tokens, min_tokens=n_tokens)
        last = started
        first = True
        async for chunk in engine.generate(EngineRequest(str(i), token_ids=tuple(ids), sampling=sampling)):
            now = time.perf_counter()
            if first:
                measured.first_token_s.append(now - started)
            elif chunk.token_ids:
                measured.between_tokens_s.append((now - last) / len(chunk.token_ids))
            first, last = False, now

    started = time.perf_counter()
    await asyncio.gather(*(ask(i, ids) for i, ids in enumerate(prompts)))
    measured.tokens_per_second.append(len(prompts) * n_tokens / (time.perf_counter() - started))


def plot(concurrent: list[int], speeds: dict[str, list[float]], path: Path) -> None:
    """Speed against requests at a time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in speeds.items():
        axes.plot(concurrent, values, marker="o", label=name)
    axes.set(xlabel="requests at a time", ylabel="tokens/s over all", xscale="log", xticks=concurrent, ylim=(0, None))
    axes.set_xticklabels([str(n) for n in concurrent])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    bundle = Bundle.open(options.bundle) if options.bundle else Bundle.latest()
    plain, _ = merge_language_model(bundle, bundle.load_model().lm)
    ours, _ = merge_language_model(bundle, bundle.load_model().lm)
    engine = TransformersEngine(ours, bundle.tokenizer, context_length=1024)
    baseline = {n: Measured() for n in options.concurrent}
    engines = {n: Measured() for n in options.concurrent}
    for i in range(options.rounds + 1):
        for n in options.concurrent:
            prompts = prompts_of(bundle.tokenizer, n, i)
            first = Measured() if i == 0 else engines[n]  # the first round warms up
            asyncio.run(complete(engine, prompts, options.tokens, first))
            speed = generate(plain, prompts, options.tokens)
            if i > 0:
                baseline[n].tokens_per_second.append(speed)
    engine.shutdown()

    table = Table("requests", "generate", "engine", "ratio", "first token p50, p95", "between tokens p50, p95")
    result: dict[str, Any] = {"lm": bundle.info.profile.language.model_dump(mode="json"), "tokens": options.tokens}
    for n in options.concurrent:
        found = engines[n]
        waits = [np.percentile(v, [50, 95]).tolist() for v in (found.first_token_s, found.between_tokens_s)]
        ratio = found.speed / baseline[n].speed
        shown = [", ".join(f"{1000 * x:.0f} ms" for x in wait) for wait in waits]
        table.add_row(str(n), f"{baseline[n].speed:.1f}", f"{found.speed:.1f}", f"{ratio:.2f}", *shown)
        result[str(n)] = {
            "generate": baseline[n].tokens_per_second,
            "engine": found.tokens_per_second,
            "ratio": ratio,
            "first_token_s": waits[0],
            "between_tokens_s": waits[1],
        }
    Console().print(table)
    result |= {"threads": torch.get_num_threads(), "machine": platform.processor() or platform.machine()}
    print(json.dumps(result))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "engines.json").write_text(json.dumps(result))
        speeds = {"generate": [baseline[n].speed for n in baseline], "engine": [engines[n].speed for n in engines]}
        plot(options.concurrent, speeds, options.out / "engines.png")


if __name__ == "__main__":
    main()
