"""How much the losses of a step differ by the micro-batches that it is cut into, under DeepSpeed.

    python -m tests.bench.accumulation

A tiny model in float32 takes four steps of six conversations, in one micro-batch and in three and six, at ZeRO stages 2
and 3. Out: JSON with the losses of each, and the most that they differ at any step.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.train_jobs.engines import BATCH_SIZE, in_workers
from tests.train_jobs.test_checkpoint import Part, run_parts

STAGES, MICRO_BATCHES = (2, 3), (BATCH_SIZE, 2, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    losses: dict[int, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        parts = {
            (stage, n): Part({"stage": stage}, "float32", 0, 4, Path(place) / f"{stage}-{n}", micro_batch=n)
            for stage in STAGES
            for n in MICRO_BATCHES
        }
        in_workers(run_parts, list(parts.values()), world=1)
        for (stage, n), part in parts.items():
            losses.setdefault(stage, {})[n] = json.loads((part.target / "losses.json").read_text())
    found: dict[str, Any] = {
        "most_difference": max(
            abs(one - whole)
            for by_size in losses.values()
            for cut in by_size.values()
            for one, whole in zip(cut, by_size[BATCH_SIZE], strict=True)
        ),
        "losses_by_stage_and_micro_batch": losses,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
