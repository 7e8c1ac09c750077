"""Operations of a step, held against what torch counts, and peaks by which they are divided."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmllm_core.config import CrossAttentionConfig, LoraConfig, MlpConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IMAGE_TOKEN_ID
from mmllm_core.language import add_adapter
from mmllm_core.model import MultimodalLM
from tests.conftest import TinyLM
from train_jobs.accelerators import measured_flops, peak_flops, sheet_flops
from train_jobs.throughput import ModelWork, memory_gb, peak_resident

ROWS, LENGTH, IMAGE = 2, 96, 4
N_SUPERVISED = ROWS * (LENGTH - 1)


def counted(model: MultimodalLM) -> float:
    """Operations of a forward and a backward pass over two rows with an image each, as torch counts them."""
    ids = torch.randint(10, 100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, :IMAGE] = IMAGE_TOKEN_ID
    labels = ids.masked_fill(ids == IMAGE_TOKEN_ID, 5)
    features = torch.randn(ROWS, IMAGE, 32, generator=torch.Generator().manual_seed(0))  # (n_images, n, d_vision)
    with FlopCounterMode(display=False) as counter:
        model(ids, torch.ones_like(ids), labels, features).backward()
    return float(counter.get_total_flops())


def planned(model: MultimodalLM) -> float:
    return ModelWork.of(model).step_flops(ROWS * LENGTH, LENGTH, N_SUPERVISED, ROWS * IMAGE)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "phi", "gpt2"])
@pytest.mark.parametrize("trains", ["connector", "adapter", "everything"])
def test_a_step_costs_what_torch_counts(tiny_lm: TinyLM, model_type: str, trains: str) -> None:
    if model_type == "gpt2" and trains == "adapter":
        pytest.skip("GPT-2 has no default targets of LoRA")
    lm: Any = tiny_lm(model_type).requires_grad_(trains == "everything")
    lm.set_attn_implementation("eager")
    if trains == "adapter":
        lm = add_adapter(lm, LoraConfig(rank=4))
    model = MultimodalLM(lm, build_connector(MlpConfig(), 32, LmShape(64, 2))).train()
    assert planned(model) == pytest.approx(counted(model), rel=0.03)


def test_blocks_of_cross_attention_belong_to_the_connector(tiny_lm: TinyLM) -> None:
    connector = build_connector(CrossAttentionConfig(every_k_layers=1, n_queries=4), 32, LmShape(64, 2))
    plain = ModelWork.of(MultimodalLM(tiny_lm("llama"), build_connector(MlpConfig(), 32, LmShape(64, 2))))
    work = ModelWork.of(MultimodalLM(tiny_lm("llama"), connector))
    assert work.n_connector > plain.n_connector
    assert work.n_frozen + work.n_trained == plain.n_frozen + plain.n_trained


def test_a_quantized_weight_counts_as_a_whole_one() -> None:
    from bitsandbytes.nn import Linear4bit
    from torch import nn

    from train_jobs.throughput import _linear_weights

    packed = nn.Sequential(Linear4bit(64, 32, bias=False)).to("cpu")
    packed(torch.zeros(1, 64))
    assert sum(_linear_weights(packed)) == 64 * 32


def test_a_frozen_weight_costs_four_and_a_trained_one_six() -> None:
    work = ModelWork(1000, 10, 100, True, 50, False, 0, 0)
    assert work.step_flops(7, 5, 3, 2) == 7 * (4 * 1000 + 6 * 10) + 3 * 4 * 50 + 2 * 6 * 100


@pytest.mark.parametrize(
    ("device", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989.4, 67),
        ("NVIDIA A100-SXM4-40GB", 312, 19.5),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_a_gpu_is_known_by_cudas_name(device: str, bfloat16: float, float32: float) -> None:
    assert sheet_flops(device, "bfloat16") == bfloat16 * 1e12
    assert sheet_flops(device, "float32") == float32 * 1e12


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Some L400"])
def test_what_no_sheet_is_for_has_no_peak(device: str) -> None:
    assert sheet_flops(device, "bfloat16") is None


def test_this_machines_peak_is_measured_once() -> None:
    peak = peak_flops("cpu", "float32")
    assert peak == measured_flops("float32")
    assert peak is not None
    assert 1e9 < peak < 1e14


def test_memory_is_the_peak_and_not_what_is_left() -> None:
    """In a process of its own, whose peak is not another test's."""
    program = (
        "from train_jobs.throughput import peak_resident\n"
        "before = peak_resident()\n"
        "held = b'x' * 300_000_000\n"
        "del held\n"
        "print(peak_resident() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(300e6, rel=0.05)
    assert memory_gb("cpu") == pytest.approx(peak_resident() / 1e9, rel=0.05)
