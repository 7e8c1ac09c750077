"""Peak memory and time of the summed loss against cross-entropy over full logits, forward and backward.

In: a number of supervised tokens, and heads of SmolLM2's and Phi-4-mini's size in bfloat16, frozen as beneath an
adapter. Out: a table and JSON: what each adds to a process's resident memory at its peak, its time, and the ratios.
Every measurement is a process of its own, whose peak the kernel is told to forget once weights and inputs are there
(`VmHWM` of proc(5)); the two take turns.

    python -m tests.bench.bench_loss [--tokens 2048] [--head smollm2] [--trained]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmllm_core.loss import summed_cross_entropy

HEADS = {"smollm2": (49_152, 576), "phi-4-mini": (200_064, 3_072)}
"""Vocabulary and `d_model`."""
MEBIBYTE = 2**20


def full_logits(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The loss as it is usually computed."""
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


LOSSES = {"full logits": full_logits, "ours": summed_cross_entropy}


def resident(field: str) -> int:
    """Bytes of this process that are (`VmRSS`) or at most were (`VmHWM`) in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(loss: str, head_name: str, n_tokens: int, trained: bool, repeats: int) -> dict[str, float]:
    """Bytes that a step of a process adds at its peak, and its median seconds."""
    torch.manual_seed(0)
    vocabulary, d_model = HEADS[head_name]
    head = nn.Linear(d_model, vocabulary, bias=False, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    nn.init.normal_(head.weight, std=0.02)
    head.requires_grad_(trained)
    hidden = torch.randn(n_tokens, d_model, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocabulary, (n_tokens,))

    def step(n: int) -> Tensor:
        hidden.grad = head.weight.grad = None
        total = LOSSES[loss](head, hidden[:n], targets[:n])
        (total / n).backward()
        return total.detach()

    step(8)  # code is loaded and threads are started
    hidden.grad = head.weight.grad = None
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        total = step(n_tokens)
        taken.append(time.perf_counter() - start)
    return {"bytes": resident("VmHWM") - before, "seconds": statistics.median(taken), "loss": float(total)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2_048, help="supervised tokens")
    parser.add_argument("--head", choices=sorted(HEADS), action="append", help="both if not given")
    parser.add_argument("--trained", action="store_true", help="the head is trained as well")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each")
    parser.add_argument("--repeats", type=int, default=2, help="steps of a process")
    parser.add_argument("--measure", choices=sorted(LOSSES), help=argparse.SUPPRESS)  # what the processes are told
    options = parser.parse_args()
    heads = options.head or list(HEADS)
    if options.measure:
        print(json.dumps(measure(options.measure, heads[0], options.tokens, options.trained, options.repeats)))
        return

    table = Table("", "peak", "time", box=None, padding=(0, 2))
    results: dict[str, dict[str, Any]] = {}
    for head in heads:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
        for _ in range(options.rounds):
            for name in LOSSES:
                command = [
                    sys.executable,
                    "-m",
                    "tests.bench.bench_loss",
                    "--head",
                    head,
                    "--tokens",
                    str(options.tokens),
                ]
                command += ["--repeats", str(options.repeats), *(["--trained"] if options.trained else [])]
                done = subprocess.run([*command, "--measure", name], check=True, stdout=subprocess.PIPE, text=True)
                found[name].append(json.loads(done.stdout))
        medians = {
            name: {key: statistics.median(each[key] for each in runs) for key in runs[0]}
            for name, runs in found.items()
        }
        full, ours = medians["full logits"], medians["ours"]
        for name, median in medians.items():
            table.add_row(f"{head}, {name}", f"{median['bytes'] / MEBIBYTE:,.0f} MiB", f"{median['seconds']:,.2f} s")
        results[head] = {
            "tokens": options.tokens,
            "trained": options.trained,
            "threads": torch.get_num_threads(),
            "runs": found,
            "memory_ratio": full["bytes"] / ours["bytes"],
            "time_ratio": full["seconds"] / ours["seconds"],
            "loss_difference": abs(full["loss"] - ours["loss"]) / full["loss"],
        }
    console = Console()
    console.print(table, highlight=False)
    for head, result in results.items():
        console.print(
            f"{head}: {result['memory_ratio']:.1f} times less memory, "
            f"{result['time_ratio']:.2f} times as fast as full logits",
            highlight=False,
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
