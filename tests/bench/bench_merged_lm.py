"""How much faster a bundle decodes once its LM is merged.

Run it as `python -m tests.bench.bench_merged_lm [BUNDLE] [--tokens 32]`.

Loads the bundle (the last one if none is given), merges a second copy of its LM in memory, and lets both decode the
same prompt in turns. Prints tokens a second of each, the ratio of their medians, and the same as JSON.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mmllm_core.bundle import Bundle
from mmllm_core.merging import merge_language_model


def tokens_per_second(lm: Any, ids: torch.Tensor, n_tokens: int, mask: torch.Tensor | None = None) -> float:
    """Decoding speed of greedy answers of exactly `n_tokens` to prompts (b, t), which are included in the time."""
    started = time.perf_counter()
    lm.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        min_new_tokens=n_tokens,
        max_new_tokens=n_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return len(ids) * n_tokens / (time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    bundle = Bundle.open(options.bundle) if options.bundle else Bundle.latest()
    merged, record = merge_language_model(bundle, bundle.load_model().lm)
    lms = {"base and adapter": bundle.load_model().causal_lm, "merged": merged}
    text = bundle.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What color is the shape?"}], tokenize=False, add_generation_prompt=True
    )
    ids = bundle.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids  # (1, t)
    speeds: dict[str, list[float]] = {name: [] for name in lms}
    with torch.inference_mode():
        for i in range(options.rounds + 1):
            for name, lm in lms.items():
                speed = tokens_per_second(lm, ids, options.tokens)
                if i > 0:  # the first round warms up
                    speeds[name].append(speed)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    ratio = medians["merged"] / medians["base and adapter"]
    for name, median in medians.items():
        print(f"{name:18} {median:8.2f} tokens/s  ({min(speeds[name]):.2f} to {max(speeds[name]):.2f})")
    print(f"merged is {ratio:.2f} times as fast")
    result = {
        "bundle": bundle.info.name,
        "quantization": record.quantization,
        "tokens_per_second": speeds,
        "ratio": ratio,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
