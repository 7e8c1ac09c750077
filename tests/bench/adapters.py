"""What it costs that several adapters share one engine, beside an engine with one adapter merged.

    python -m tests.bench.adapters [--requests 8] [--tokens 64]

SmolLM2-135M-Instruct with random adapters (rank 16, all linear layers of its blocks). Each way decodes the same prompts
at the same time: merged, all by one adapter, and by four adapters in turns. Out: JSON with tokens a second over all
requests, the best of three, and the ratios to merged.
"""

import argparse
import asyncio
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mmllm_core.config import LoraConfig
from mmllm_core.engine.lora import LoraAdapter, adaptable_layers, load_lora
from mmllm_core.engine.protocol import EngineRequest, SamplingParams
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.language import add_adapter, load_adapter, load_language_model, load_tokenizer
from mmllm_core.merging import merge_adapter
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve

N_ADAPTERS, PROMPT = 4, 48
LANGUAGE = load_profile("embedded").language.model_copy(update={"quantization": "none"})


def save_adapter(weights: Path, folder: Path, seed: int) -> None:
    """A random adapter in peft's format."""
    torch.manual_seed(seed)
    adapted: Any = add_adapter(load_language_model(LANGUAGE, weights), LoraConfig(rank=16))
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.01)
    adapted.save_pretrained(folder)


def best_rate(lm: Any, tokenizer: Any, ways: dict[str, list[LoraAdapter]], n: int, n_tokens: int) -> dict[str, float]:
    """Tokens a second of one engine, by way; the ways take turns."""
    adapts = any(ways.values())
    engine = TransformersEngine(
        lm, tokenizer, context_length=512, kv_cache_bytes=300_000_000, takes_adapters=adapts, step_tokens=512
    )
    sampling = SamplingParams(max_tokens=n_tokens, min_tokens=n_tokens)

    async def ask(i: int, adapters: list[LoraAdapter], run: int) -> int:
        ids = tuple(1000 + (97 * i + 13 * j + 7 * run) % 5000 for j in range(PROMPT))
        adapter = adapters[i % len(adapters)] if adapters else None
        request = EngineRequest(str(i), token_ids=ids, sampling=sampling, adapter=adapter, namespace=str(id(adapter)))
        return sum([len(chunk.token_ids) async for chunk in engine.generate(request)])

    async def all_at_once(adapters: list[LoraAdapter], run: int) -> float:
        begin = time.perf_counter()
        done = await asyncio.gather(*(ask(i, adapters, run) for i in range(n)))
        return sum(done) / (time.perf_counter() - begin)

    rates = dict.fromkeys(ways, 0.0)
    for run in range(4):  # the first warms up
        for way, adapters in ways.items():
            rate = asyncio.run(all_at_once(adapters, run))
            rates[way] = max(rates[way], rate if run else 0.0)
    engine.shutdown()
    return rates


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    weights = resolve(LANGUAGE.source)
    tokenizer = load_tokenizer(weights)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / str(i) for i in range(N_ADAPTERS)]
        for i, place in enumerate(folders):
            save_adapter(weights, place, i)
        plain = load_language_model(LANGUAGE, weights)
        dtype = plain.get_input_embeddings().weight.dtype
        merged = merge_adapter(load_adapter(load_language_model(LANGUAGE, weights), folders[0]), dtype)
        rates = best_rate(merged, tokenizer, {"merged": []}, arguments.requests, arguments.tokens)
        del merged
        gc.collect()
        layers = adaptable_layers(plain)
        adapters = [load_lora(place, place.name, layers, dtype=dtype) for place in folders]
        ways = {"one adapter": adapters[:1], "four adapters": adapters}
        rates |= best_rate(plain, tokenizer, ways, arguments.requests, arguments.tokens)
    ratios = {way: rate / rates["merged"] for way, rate in rates.items()}
    print(json.dumps({"dtype": str(dtype), "tokens_per_s": rates, "of_merged": ratios}))


if __name__ == "__main__":
    main()
