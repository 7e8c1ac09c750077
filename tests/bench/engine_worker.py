"""One way to answer requests, in a process of its own, for `tests.bench.engines`.

    python -m tests.bench.engine_worker generate|transformers|vllm LM_FOLDER

Reads lines of JSON, each a list of requests {"ids": prompt, "n": tokens to give, "at": when it comes, in seconds}, and
answers each line by one: {"seconds": until all are answered, "first": seconds to each first token, "between": seconds
between tokens}. So nothing of one way is in memory, or in the caches of CPUs, where another is measured.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CONTEXT = 1024
MOST = 64
"""Requests that `generate` takes at a time."""

Measured = dict[str, Any]
Answer = Callable[[list[dict[str, Any]]], Measured]
Way = tuple[Answer, Callable[[], None]]
"""How requests are answered, and how that is ended."""


def of_generate(folder: Path) -> Way:
    """`transformers.generate`: whoever waits when it is free becomes one static batch, padded on the left."""
    import torch

    lm = load(folder)

    @torch.inference_mode()
    def answer(requests: list[dict[str, Any]]) -> Measured:
        waiting, first, started = sorted(requests, key=lambda r: r["at"]), [], time.perf_counter()
        while waiting:
            time.sleep(max(0.0, waiting[0]["at"] - (time.perf_counter() - started)))
            now = time.perf_counter() - started
            batch = [r for r in waiting if r["at"] <= now][:MOST]
            waiting = waiting[len(batch) :]
            longest, n = max(len(r["ids"]) for r in batch), max(r["n"] for r in batch)
            ids = torch.tensor([[0] * (longest - len(r["ids"])) + r["ids"] for r in batch])  # (b, t)
            mask = torch.tensor([[0] * (longest - len(r["ids"])) + [1] * len(r["ids"]) for r in batch])
            settings = {"min_new_tokens": n, "max_new_tokens": n, "do_sample": False, "pad_token_id": 0}
            lm.generate(input_ids=ids, attention_mask=mask, **settings)
            first += [time.perf_counter() - started - r["at"] for r in batch]  # all of an answer comes at once
        return {"seconds": time.perf_counter() - started, "first": first, "between": []}

    return answer, lambda: None


def of_engine(engine: Any) -> Way:
    """An engine of ours."""
    from mmllm_core.engine.protocol import EngineRequest, SamplingParams

    async def answer(requests: list[dict[str, Any]]) -> Measured:
        first: list[float] = []
        between: list[float] = []
        started = time.perf_counter()

        async def ask(i: int, request: dict[str, Any]) -> None:
            await asyncio.sleep(max(0.0, request["at"] - (time.perf_counter() - started)))
            n, last = 0, started + request["at"]
            sampling = SamplingParams(max_tokens=request["n"], min_tokens=request["n"])
            async for chunk in engine.generate(
                EngineRequest(str(i), token_ids=tuple(request["ids"]), sampling=sampling)
            ):
                now = time.perf_counter()
                if chunk.token_ids:
                    (between if n else first).append((now - last) / (len(chunk.token_ids) if n else 1))
                    last = now
                n += len(chunk.token_ids)
            assert n == request["n"], f"{n} tokens came, and {request['n']} were asked for"

        await asyncio.gather(*(ask(i, request) for i, request in enumerate(requests)))
        return {"seconds": time.perf_counter() - started, "first": first, "between": between}

    loop = asyncio.new_event_loop()
    return lambda requests: loop.run_until_complete(answer(requests)), engine.shutdown


def transformers_engine(folder: Path) -> Any:
    """The engine as the service starts it: its team of threads is the only one of the process."""
    from transformers import AutoTokenizer

    from mmllm_core.engine.transformers_engine import TransformersEngine

    def start() -> Any:
        return TransformersEngine(load(folder), AutoTokenizer.from_pretrained(folder), context_length=CONTEXT)

    with ThreadPoolExecutor(1) as starting:
        return starting.submit(start).result()


def vllm_engine(folder: Path) -> Any:
    """vLLM as the service starts it."""
    import torch
    from transformers import AutoTokenizer

    from mmllm_core.config import VllmConfig
    from mmllm_core.engine.vllm_engine import VllmEngine
    from mmllm_core.language import stop_token_ids

    lm, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"context_length": CONTEXT, "dtype": lm.dtype, "config": VllmConfig(), "device": device}
    return VllmEngine(
        folder, tokenizer, embed=lm.get_input_embeddings(), stop_ids=stop_token_ids(lm, tokenizer), **settings
    )


def load(folder: Path) -> Any:
    """A causal LM in the dtype in which it was saved, on as many threads as there are CPUs."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


WAYS: dict[str, Callable[[Path], Way]] = {
    "generate": of_generate,
    "transformers": lambda folder: of_engine(transformers_engine(folder)),
    "vllm": lambda folder: of_engine(vllm_engine(folder)),
}


def main() -> None:
    """Answer until there is nothing more to read."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    answer, end = WAYS[sys.argv[1]](Path(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
    end()


if __name__ == "__main__":
    main()
