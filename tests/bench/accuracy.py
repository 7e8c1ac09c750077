"""What the whole recipes of the embedded profile reach on all of easy-VQA's test questions, and how long they train.

    python -m tests.bench.accuracy [instruct] [resampler] [cross-attention] [--questions 0]

Trains CLIP, stores its features and tunes in a home that is removed again: a quarter to three quarters of an hour for
each recipe on two cores. Out: JSON with, for each, minutes of `mmllm train`, the share of right answers with its 95%
interval, and by how much the loss on plain prose is above that of the untuned LM.
"""

import argparse
import json
import os
import time
from typing import Any

from mmllm_core.bundle import Bundle
from mmllm_core.evaluation.accuracy import OVERALL
from mmllm_core.evaluation.text_ability import compare
from tests.bench.scratch import mmllm, scratch_home

_LONGER = ["steps=400", "learning_rates.connector=0.001", "lora.interpolation=1"]
_QUERIES = ["connector.n_queries=8", "connector.depth=2", "connector.head_dim=32"]
RECIPES: dict[str, list[str]] = {
    "instruct": [],
    "resampler": ["name=embedded-resampler", "connector.kind=resampler", *_QUERIES, *_LONGER],
    "cross-attention": [
        "name=embedded-cross-attention",
        "connector.kind=cross_attention",
        "connector.gate_rate=10",
        *_QUERIES,
        *_LONGER,
    ],
}
"""Changes to `embedded-instruct`, as the documentation has them."""


def measure(changes: list[str], questions: int, more: list[str]) -> dict[str, Any]:
    """Train one recipe and ask its bundle."""
    from cluster.local import local_ray
    from train_jobs.evaluate import evaluate

    began = time.monotonic()
    mmllm("train", "embedded-instruct", *changes, *more)
    minutes = (time.monotonic() - began) / 60
    bundle = Bundle.latest()
    with local_ray():
        score = evaluate(bundle, limit=questions or None, workers=2).scores[OVERALL]
    tuned, untuned = compare(bundle, "cpu")
    return {
        "bundle": bundle.info.name,
        "minutes": minutes,
        "accuracy": score.accuracy,
        "asked": score.asked,
        "shown": str(score),
        "prose_loss_change": tuned.loss_change(untuned),
        "text_questions_right": {"tuned": tuned.right, "untuned": untuned.right, "asked": tuned.asked},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RECIPES)}; all if none is given")
    parser.add_argument("--questions", type=int, default=0, help="test questions to ask; 0 asks all")
    parser.add_argument(
        "--change", action="append", default=[], metavar="KEY=VALUE", help="of every recipe, to try this"
    )
    options = parser.parse_args()
    if unknown := set(options.recipes) - set(RECIPES):
        parser.error(f"no recipe is called '{min(unknown)}': choose of {', '.join(RECIPES)}")
    found = {}
    with scratch_home() as place:
        os.environ["MMLLM_HOME"] = str(place)
        mmllm("train", "embedded-clip")
        mmllm("embed", "embedded-instruct")
        for name in options.recipes or RECIPES:
            found[name] = measure(RECIPES[name], options.questions, options.change)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
