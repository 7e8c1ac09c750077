"""Speed of our training against plainer loops of the same model on the same conversations, side by side.

`hf`       `mmllm train`'s loop on as many workers as there are cores, with stored features and packed conversations,
           against Hugging Face's `Trainer` and peft in one process on all cores, which runs CLIP as it goes and pads
           (`hf_trainer_loop`); the LM is loaded alike for both, and so computed in the same dtype
`rows`     the same, but that its rows are easy-VQA's own, one question each, where ours ask several about an image in
           one conversation; as many questions a step, and compared by supervised tokens, which are theirs
`bare`     Ray Train and DeepSpeed with one worker, against a loop in PyTorch alone; one thread each
`workers`  two workers against one, each on a core of its own

In: the home (MMLLM_HOME), where the embedded CLIP must be trained already; features that it lacks are made first. Out:
a table, ratios and JSON; the exit code is 1 if a ratio misses its target. All train `embedded-instruct` on easy-VQA,
as many conversations a step. Each loop is a process of its own, and the two of a comparison take turns; of each, speed
is that of the median step, the first few left out, in which libraries warm up.

    python -m tests.bench.bench_training [hf] [rows] [bare] [workers] [--steps 16] [--rounds 2]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from cluster.local import quieten
from tests.bench.training_loops import Setup, Step, bare_steps, pinned_train_loop, prepare, ray_train_steps
from train_jobs.accelerators import usable_cores

CORES = usable_cores()
WARM_UP = 3
"""Steps of each process that are not counted."""


def ours(workers: int, steps: int) -> list[Step]:
    """Steps as a user of `mmllm train` gets them."""
    return ray_train_steps(Setup.of(steps, workers=workers))


def pinned(workers: int, steps: int) -> list[Step]:
    """Ours with each worker on a core of its own."""
    return ray_train_steps(Setup.of(steps, workers=workers), pinned_train_loop)


def hf_trainer(setup: Setup) -> list[Step]:
    """Steps of the Hugging Face loop."""
    from tests.bench.hf_trainer_loop import hf_trainer_steps

    return hf_trainer_steps(setup)


LOOPS: dict[str, Callable[[int], list[Step]]] = {
    "mmllm train": lambda steps: ours(CORES, steps),
    "Trainer and peft": lambda steps: hf_trainer(Setup.of(steps)),
    "Trainer and peft, a question a row": lambda steps: hf_trainer(Setup.of_single_questions(steps)),
    "Ray Train and DeepSpeed": lambda steps: ours(1, steps),
    "PyTorch alone": lambda steps: bare_steps(Setup.of(steps)),
    "two workers": lambda steps: pinned(2, steps),
    "one worker": lambda steps: pinned(1, steps),
}
ONE_PROCESS = {"Trainer and peft": CORES, "Trainer and peft, a question a row": CORES, "PyTorch alone": 1}
"""Threads of the loops that do not run on Ray, which gives every worker as many as it has cores: one."""


@dataclass(frozen=True)
class Comparison:
    """Two loops, and how many times as fast the first shall be."""

    ours: str
    baseline: str
    target: float
    unit: Literal["samples", "supervised"] = "samples"
    """What is counted: conversations, or supervised tokens."""


_UNITS = {"samples": "conversations", "supervised": "supervised tokens"}
COMPARISONS = {
    "hf": Comparison("mmllm train", "Trainer and peft", 2.0),
    "rows": Comparison("mmllm train", "Trainer and peft, a question a row", 2.0, "supervised"),
    "bare": Comparison("Ray Train and DeepSpeed", "PyTorch alone", 0.9),
    "workers": Comparison("two workers", "one worker", 1.7),
}


@dataclass(frozen=True)
class Speed:
    """Of a loop, over all its processes."""

    step_seconds: float
    samples_per_second: float
    supervised_per_second: float
    tokens_per_second: float

    @classmethod
    def of(cls, steps: list[Step]) -> "Speed":
        """Medians over steps."""
        return cls(
            statistics.median(step.seconds for step in steps),
            statistics.median(step.samples / step.seconds for step in steps),
            statistics.median(step.supervised / step.seconds for step in steps),
            statistics.median(step.tokens / step.seconds for step in steps),
        )


def run(loop: str, steps: int) -> list[Step]:
    """Steps of a loop in a process of its own, those of the warm-up left out."""
    command = [sys.executable, "-m", "tests.bench.bench_training", "--steps", str(steps), "--loop", loop]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if loop in ONE_PROCESS:
        environment["OMP_NUM_THREADS"] = str(ONE_PROCESS[loop])
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return [Step(**step) for step in found][WARM_UP:]


def compare(comparison: Comparison, steps: int, rounds: int) -> dict[str, list[list[Step]]]:
    """Steps of every process of both loops."""
    found: dict[str, list[list[Step]]] = {comparison.ours: [], comparison.baseline: []}
    for _ in range(rounds):
        for loop, processes in found.items():
            processes.append(run(loop, steps))
            print(f"{loop}: {Speed.of(processes[-1]).step_seconds:.2f} s a step", file=sys.stderr)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="*", help=f"of {', '.join(COMPARISONS)}; all if none is given")
    parser.add_argument("--steps", type=int, default=16, help=f"of each process, {WARM_UP} of them to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each loop")
    parser.add_argument("--loop", choices=sorted(LOOPS), help=argparse.SUPPRESS)  # what the processes are told
    options = parser.parse_args()
    if unknown := set(options.comparisons) - set(COMPARISONS):
        parser.error(f"no comparison is called '{min(unknown)}': choose of {', '.join(COMPARISONS)}")
    if options.steps <= WARM_UP:
        parser.error(f"--steps: {WARM_UP} are left out, so give more")
    quieten()
    if options.loop:
        print(json.dumps([asdict(step) for step in LOOPS[options.loop](options.steps)]))
        return

    prepare()
    table = Table("", "step", "samples/s", "supervised/s", "tokens/s", box=None, padding=(0, 1))
    results = {}
    for name in options.comparisons or COMPARISONS:
        comparison = COMPARISONS[name]
        found = compare(comparison, options.steps, options.rounds)
        speeds = {loop: Speed.of([step for steps in processes for step in steps]) for loop, processes in found.items()}
        for loop, speed in speeds.items():
            table.add_row(
                f"{name}: {loop}", f"{speed.step_seconds:.2f} s", *(f"{x:.2f}" for x in list(vars(speed).values())[1:])
            )
        fast, slow = (
            getattr(speeds[loop], f"{comparison.unit}_per_second") for loop in (comparison.ours, comparison.baseline)
        )
        results[name] = {
            "ratio": fast / slow,
            "unit": comparison.unit,
            "target": comparison.target,
            "speeds": {loop: asdict(speed) for loop, speed in speeds.items()},
            "seconds": {loop: [[s.seconds for s in steps] for steps in processes] for loop, processes in found.items()},
        }
    console = Console()
    console.print(table, highlight=False)
    for name, result in results.items():
        comparison = COMPARISONS[name]
        console.print(
            f"{name}: {comparison.ours} trains {result['ratio']:.2f} times as many {_UNITS[comparison.unit]} a second "
            f"as {comparison.baseline} (target {comparison.target:g})",
            highlight=False,
        )
    machine = {"cores": CORES, "machine": platform.processor() or platform.machine()}
    print(json.dumps({"steps": options.steps, "warm_up": WARM_UP, "rounds": options.rounds, **machine, **results}))
    if any(result["ratio"] < result["target"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
