"""Packed layers, in a process of their own, for kernels are counted by the process."""

import subprocess
import sys

import pytest
import torch

from mmllm_core.engine.packed_linear import is_packable

GROWN = """
import psutil, torch
from mmllm_core.engine.packed_linear import PackedLinear

layer = PackedLinear(torch.randn(96, 64))

def grown_mb(rows):
    before = psutil.Process().memory_full_info().uss
    for n in rows:
        x, other = torch.randn(n, 64), torch.randn(n, 96)
        layer(x), layer.silu(x), layer.times(x, other)
    return (psutil.Process().memory_full_info().uss - before) / 1e6

print(grown_mb(range(1, 200)), grown_mb(range(200, 400)))
"""


@pytest.mark.skipif(not is_packable(torch.empty(1, 1)), reason="no oneDNN")
def test_lines_of_ever_other_lengths_take_no_more_memory() -> None:
    done = subprocess.run([sys.executable, "-c", GROWN], check=True, capture_output=True, text=True)
    first, later = map(float, done.stdout.split())
    assert first > 30, "kernels are small here: this test sees nothing"
    assert later < first / 4
