"""What this machine's libraries add to a CPU worker's memory: measured by training a few layers of a random LM.

In: a `Rehearsal`. Out: a `Measured`, or this machine as an `Accelerator`. The LM has the shapes of the one that is
planned but only a few layers, and random weights; it is quantized, adapted and trained for a few steps by the code that
trains the real one, in a process of its own (`python -m train_jobs.rehearsal`, JSON on stdin). Three things are read
off that no config tells: what the libraries take once they are loaded, what the allocator holds beyond what is in use,
and how fast a core multiplies.
"""

import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmllm_core.config import Dtype, LanguageConfig, LoraConfig
from mmllm_core.errors import EnvironmentLack
from train_jobs.accelerators import CPU, Accelerator, measured_flops

LAYERS = 6
"""Some 64 MiB arenas are filled, and a few seconds pass."""
LONGEST = 512
"""Longer rows are rehearsed at this length."""
_LIBRARIES = (
    "ray.train.torch",
    "train_jobs.train_loop",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "peft",
    "transformers.models.auto.modeling_auto",
    "mmllm_core.model",
)


@dataclass(frozen=True)
class Rehearsal:
    """What is to be rehearsed."""

    lm_config: dict[str, Any]
    language: dict[str, Any]
    """The profile's `LanguageConfig`."""
    lora: dict[str, Any] | None
    trains_lm: bool
    """Whether the LM's own weights are trained."""
    gradient_checkpointing: bool
    rows: int
    lengths: tuple[int, ...]
    """Positions of a row of each step."""


@dataclass(frozen=True)
class Measured:
    """What was read off."""

    resident: float
    """Bytes of a process that has loaded a worker's libraries."""
    slack: float
    """What the allocator holds beyond what is in use at the peak, as a share of what a step adds; glibc keeps freed
    blocks in its arenas, where blocks of other sizes do not fit. 0 where the C library does not tell."""
    flops: float
    """Operations a second of one core, in the dtype that the LM is computed in."""


def rehearse(rehearsal: Rehearsal) -> Measured:
    """Rehearse in a worker's environment.

    Raises:
        EnvironmentLack: the libraries that workers load do not load or run here.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as Ray gives a worker
    done = subprocess.run(
        [sys.executable, "-m", "train_jobs.rehearsal"],
        input=json.dumps(asdict(rehearsal)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EnvironmentLack(f"a worker's libraries do not run here: {reason}: run 'mmllm doctor'")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def this_machine(rehearsal: Rehearsal, workers: int) -> Accelerator:
    """This machine's memory and cores, shared by `workers` of one core each, as a rehearsal finds them.

    Raises:
        EnvironmentLack: the libraries that workers load do not run here.
    """
    import psutil

    found = rehearse(rehearsal)
    memory = psutil.virtual_memory().total / workers
    return Accelerator(CPU, memory, found.flops, found.resident, found.slack, "measured on one core of this machine")


class _Watch(threading.Thread):
    """Samples anonymous resident memory and what malloc has given out."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.resident = self.in_use = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self.sample()

    def sample(self) -> None:
        self.resident = max(self.resident, _anonymous())
        self.in_use = max(self.in_use, _in_use() or 0)

    def end(self) -> None:
        self._ended.set()
        self.join()
        self.sample()


def _measure(rehearsal: Rehearsal) -> Measured:
    import psutil
    import torch

    for name in (*_LIBRARIES, f"transformers.models.{rehearsal.lm_config['model_type']}"):
        importlib.import_module(name)
    resident = float(psutil.Process().memory_info().rss)
    if _in_use() is None:
        return Measured(resident, 0.0, measured_flops(_dtype(rehearsal)))
    torch.manual_seed(0)
    before_resident, before_in_use = _anonymous(), _in_use() or 0
    base = _load(rehearsal)
    loaded = _in_use() or 0
    watch = _Watch()
    watch.start()
    for length in rehearsal.lengths:
        _step(base, rehearsal.rows, length, int(rehearsal.lm_config["hidden_size"]))
    watch.end()
    held = (watch.resident - before_resident) - (watch.in_use - before_in_use)
    return Measured(resident, max(0.0, held / (watch.in_use - loaded)), measured_flops(_dtype(rehearsal)))


def _load(rehearsal: Rehearsal) -> Any:
    """The decoder of a random LM, saved, loaded and adapted as the real one is."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mmllm_core.language import add_adapter, load_language_model
    from mmllm_core.packed_attention import attend_packed

    dtype = getattr(torch, _dtype(rehearsal))
    config = AutoConfig.for_model(**rehearsal.lm_config)
    with tempfile.TemporaryDirectory() as folder:
        language = LanguageConfig.model_validate(rehearsal.language)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        lm: Any = load_language_model(language, Path(folder))
    attend_packed(lm)
    if rehearsal.lora:
        adapted: Any = add_adapter(lm, LoraConfig.model_validate(rehearsal.lora)).to(dtype)
        lm = adapted.get_base_model()
    elif rehearsal.trains_lm:
        lm.requires_grad_(True)
    if rehearsal.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm.base_model.train()


def _dtype(rehearsal: Rehearsal) -> Dtype:
    from mmllm_core.language import compute_dtype

    return compute_dtype(LanguageConfig.model_validate(rehearsal.language).dtype, CPU)


def _step(base: Any, rows: int, length: int, d_model: int) -> None:
    import torch

    from mmllm_core.packed_attention import Packing

    embeddings = torch.randn(1, rows * length, d_model, dtype=base.dtype, requires_grad=True)  # (1, t, d_model)
    packing = Packing.of([length] * rows)
    hidden = base(
        inputs_embeds=embeddings, position_ids=packing.position_ids, packing=packing, use_cache=False
    ).last_hidden_state  # (1, t, d_model)
    hidden.float().sum().backward()


def _anonymous() -> int:
    """Bytes of resident memory that no file backs; of Linux."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2` (man mallinfo)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


def _in_use() -> int | None:
    """Bytes that malloc has given out and not got back; None where the C library has no `mallinfo2`."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    ask.restype = _Mallinfo
    found = ask()
    return int(found.uordblks + found.hblkhd)


def main() -> None:
    """Read a rehearsal from stdin, measure in a thread as Ray's workers run in one, and print JSON."""
    values = json.load(sys.stdin)
    rehearsal = Rehearsal(**(values | {"lengths": tuple(values["lengths"])}))
    found: list[Measured] = []
    thread = threading.Thread(target=lambda: found.append(_measure(rehearsal)))
    thread.start()
    thread.join()
    if not found:
        raise SystemExit(1)  # the thread has told why
    print(json.dumps(asdict(found[0])))


if __name__ == "__main__":
    main()
