"""How near `mmllm plan` comes to what training workers take on CPU.

Run it as `python -m tests.bench.bench_plan [RECIPE] [key=value ...] [--home DIR]`.

Plans the recipe on this machine's cores, then trains it for a few steps (word alignment and evaluation left out, which
the plan does not count) and reads the peak resident memory of every training worker from the kernel. What training
needs and the home lacks is made first: a CLIP of a few steps, and the features. Prints planned and measured bytes,
their ratio, and the same as JSON; the exit code is 1 if they differ by more than 15%.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil

from cluster.plan_command import plan_values
from mmllm_core.config import parse_overrides
from tests.bench.scratch import mmllm, scratch_home
from train_jobs.plan import PlanOptions, plan
from train_jobs.progress import read_metrics
from train_jobs.recipe import load_training_recipe
from train_jobs.run_folders import runs_folder
from train_jobs.throughput import peak_resident

ALLOWED = 0.15
SHORT = {"steps": 3, "word_alignment_steps": 0, "evaluation_questions": 0}


def watch(command: list[str]) -> dict[int, dict[str, Any]]:
    """Run a command; peak memory, and seconds seen, of every Ray Train worker that it starts, by process id."""
    found: dict[int, dict[str, Any]] = {}
    running = subprocess.Popen(command)
    root = psutil.Process(running.pid)
    while running.poll() is None:
        for process in root.children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    memory = process.memory_info()
                    found[process.pid] = {"peak": peak_resident(process.pid), "shared": getattr(memory, "shared", 0)}
            except (psutil.Error, OSError, IndexError):
                continue  # it ended meanwhile; its last mark stands
        time.sleep(0.05)
    if running.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {running.returncode}")
    return found


def main() -> None:
    """Plan, measure, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="embedded-instruct")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--home", type=Path, help="MMLLM_HOME to use; by default an empty one that is removed again")
    options = parser.parse_args()

    overrides = SHORT | parse_overrides(options.overrides)
    with nullcontext(options.home.absolute()) if options.home else scratch_home() as place:
        os.environ["MMLLM_HOME"] = str(place)
        recipe = load_training_recipe(options.recipe, overrides)
        planned = plan(recipe, PlanOptions("cpu", recipe.workers))
        settings = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        mmllm("train", "embedded-clip", "steps=5")
        mmllm("embed", options.recipe, *settings)
        workers = watch([sys.executable, "-m", "cluster.cli", "train", options.recipe, *settings])
        steps = [
            entry for entry in read_metrics(runs_folder() / recipe.name / "metrics.jsonl") if "step_seconds" in entry
        ]
    if len(workers) != recipe.workers:
        raise SystemExit(
            f"{len(workers)} workers were seen of {recipe.workers}: does the home hold its bundle already?"
        )
    measured = max(worker["peak"] for worker in workers.values())
    ratio = planned.as_written.memory.total / measured
    print(f"planned  {planned.as_written.memory.total / 1e9:6.3f} GB a worker")
    shown = ", ".join(f"{worker['peak'] / 1e9:.3f}" for worker in workers.values())
    print(f"measured {measured / 1e9:6.3f} GB, the most of {shown}")
    print(f"planned is {ratio:.2f} of measured")
    planned_seconds = planned.hours * 3600 / recipe.steps
    seconds = (steps[-1]["seconds"] - steps[0]["seconds"]) / (len(steps) - 1)  # the first step compiles
    print(f"a step: planned {planned_seconds:.1f} s at {planned.options.mfu:.0%} of the peak, measured {seconds:.1f} s")
    result = {
        "ratio": ratio,
        "seconds_per_step": {"planned": planned_seconds, "measured": seconds},
        "measured": [worker["peak"] for worker in workers.values()],
        "shared": [worker["shared"] for worker in workers.values()],
        "plan": plan_values(planned),
        "overrides": overrides,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))
    if abs(ratio - 1) > ALLOWED:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
