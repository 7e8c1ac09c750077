"""Memory and speed of accelerators: a table from the makers' data sheets, and this machine's cores, measured.

In: a name to plan for, or a torch device. Out: an `Accelerator`, or a peak in floating-point operations a second. Does
not know models.
"""

import os
import sys
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from mmllm_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from mmllm_core.config import Dtype

CPU = "cpu"
CUDA_RUNTIME = 1.0e9
"""Bytes of the CUDA context with its kernels, cuBLAS's workspace and NCCL's buffers. An assumption, not measured."""
CUDA_SLACK = 0.1
"""CUDA's caching allocator cuts blocks from segments of 2 and 20 MiB or more, and rows of another length do not fit the
holes. An assumption, not measured."""
_SIDE = 1024
_MEASURED_SECONDS = 0.5


@dataclass(frozen=True)
class Accelerator:
    """What one worker has."""

    name: str
    memory: float
    """Bytes. Of GPUs as on the data sheet, in units of 1e9."""
    flops: float
    """Dense bfloat16 multiply-adds with float32 sums, in floating-point operations a second."""
    runtime: float
    """Bytes that are taken before anything of the model is there: libraries on CPU, the CUDA context on a GPU."""
    slack: float
    """What the allocator holds beyond what is in use, as a share of what a step adds."""
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether kernels, attention and allocator are CUDA's."""
        return self.name != CPU


@dataclass(frozen=True)
class _Sheet:
    """A GPU by its data sheet: dense operations, without sparsity."""

    name: str
    device_name: tuple[str, ...]
    """Words that CUDA's name of the device holds, all of them."""
    gigabytes: float
    bfloat16: float
    """TFLOP/s; float16 is the same."""
    float32: float
    """TFLOP/s of the ordinary cores: torch uses TensorFloat-32 only when it is told to."""
    source: str


_SHEETS = (  # the more particular before the more general: a device is what first matches
    _Sheet("B200", ("B200",), 180, 2250, 75, "NVIDIA DGX B200 data sheet, an eighth"),
    _Sheet("H200-NVL", ("H200", "NVL"), 141, 835.5, 60, "NVIDIA H200 data sheet, NVL"),
    _Sheet("H200", ("H200",), 141, 989.4, 67, "NVIDIA H200 data sheet, SXM"),
    _Sheet("GH200", ("GH200",), 96, 989.4, 67, "NVIDIA GH200 data sheet"),
    _Sheet("H100-NVL", ("H100", "NVL"), 94, 835.5, 60, "NVIDIA H100 data sheet, NVL"),
    _Sheet("H100-PCIe", ("H100", "PCIe"), 80, 756, 51, "NVIDIA H100 data sheet, PCIe"),
    _Sheet("H100", ("H100",), 80, 989.4, 67, "NVIDIA H100 data sheet, SXM"),
    _Sheet("A100-80GB", ("A100", "80GB"), 80, 312, 19.5, "NVIDIA A100 data sheet"),
    _Sheet("A100-40GB", ("A100",), 40, 312, 19.5, "NVIDIA A100 data sheet"),
    _Sheet("L40S", ("L40S",), 48, 362, 91.6, "NVIDIA L40S data sheet"),
    _Sheet("L4", ("L4",), 24, 121, 30.3, "NVIDIA L4 data sheet"),
    _Sheet("A10G", ("A10G",), 24, 70, 35, "AWS G5 instances: A10G"),
    _Sheet("A10", ("A10",), 24, 125, 31.2, "NVIDIA A10 data sheet"),
    _Sheet("RTX-4090", ("RTX", "4090"), 24, 165.2, 82.6, "NVIDIA Ada whitepaper, float32 sums"),
    _Sheet("RTX-3090", ("RTX", "3090"), 24, 71, 35.6, "NVIDIA GA102 whitepaper, float32 sums"),
)

GPUS = {
    sheet.name: Accelerator(
        sheet.name, sheet.gigabytes * 1e9, sheet.bfloat16 * 1e12, CUDA_RUNTIME, CUDA_SLACK, sheet.source
    )
    for sheet in _SHEETS
}


def accelerator(name: str) -> Accelerator:
    """A GPU by name.

    Raises:
        ConfigError: unknown name.
    """
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise ConfigError(f"--gpu {name}: unknown: choose one of {', '.join([*GPUS, CPU])}")
    return known[name.lower()]


def peak_flops(device: "torch.device | str", dtype: "Dtype") -> float | None:
    """Peak of a torch device, in floating-point operations a second: the divisor of an MFU.

    A GPU's is its data sheet's. Of a CPU there is no sheet that holds for its cores as this process may use them: a
    matrix product measures it, once, in at most a second.

    Args:
        dtype: of the products; sums are float32.

    Returns:
        None for a GPU that is not in the table.
    """
    import torch

    device = torch.device(device)
    if device.type == CPU:
        return measured_flops(dtype)
    return sheet_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def sheet_flops(device_name: str, dtype: "Dtype") -> float | None:
    """Peak of a GPU by the name that CUDA gives it, such as `NVIDIA H100 80GB HBM3`; None if it is not in the table, or
    a slice of a GPU."""
    words = device_name.lower().replace("-", " ").split()
    if "mig" in words:
        return None
    for sheet in _SHEETS:
        if all(word.lower() in words for word in sheet.device_name):
            return (sheet.float32 if dtype == "float32" else sheet.bfloat16) * 1e12
    return None


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has where a container limits them."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@cache
def measured_flops(dtype: "Dtype") -> float:
    """Fastest product of two (1024, 1024) matrices on CPU, with the threads that torch has in this process."""
    import torch

    a, b = (torch.ones(_SIDE, _SIDE, dtype=getattr(torch, dtype)) for _ in range(2))
    fastest = float("inf")
    deadline = time.perf_counter() + _MEASURED_SECONDS
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * _SIDE**3 / fastest
