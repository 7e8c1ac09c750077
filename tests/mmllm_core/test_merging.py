"""Merging: the plain LM says what quantized base and adapter said, for Llama, Phi-3 and phi-2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmllm_core.config import LanguageConfig, LoraConfig, PathSource
from mmllm_core.errors import ExportError
from mmllm_core.language import LORA_TARGETS, add_adapter, load_language_model
from mmllm_core.merging import merge_adapter, write_language_model
from tests.conftest import TinyLM

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def config(folder: Path, quantization: str, dtype: str = "float32") -> LanguageConfig:
    return LanguageConfig(source=PathSource(path=folder), quantization=quantization, dtype=dtype)  # type: ignore[arg-type]


def adapted(folder: Path, quantization: str, dtype: str = "float32") -> Any:
    """The LM with an adapter that says something: fresh ones add nothing."""
    lm = add_adapter(load_language_model(config(folder, quantization, dtype), folder), LoraConfig(rank=4)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lm


@torch.inference_mode()
def logits(lm: Any) -> Tensor:
    return lm(input_ids=IDS).logits.float()


@pytest.fixture(params=sorted(LORA_TARGETS))
def folder(request: pytest.FixtureRequest, tiny_lm: TinyLM, tmp_path: Path) -> Path:
    tiny_lm(request.param).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merged_logits_equal_base_and_adapter_in_float32(quantization: str, folder: Path) -> None:
    lm = adapted(folder, quantization)
    with lm.disable_adapter():
        base = logits(lm)
    before = logits(lm)
    after = logits(merge_adapter(lm, torch.float32))
    assert (before - base).abs().max() > 0.1, "the adapter says nothing, and losing it would not show"
    assert (after - before).abs().max() < 1e-4


def test_merged_logits_are_within_bfloat16_of_base_and_adapter(folder: Path) -> None:
    lm = adapted(folder, "nf4", "bfloat16")
    before = logits(lm)
    after = logits(merge_adapter(lm, torch.bfloat16))
    assert (after - before).norm() < 0.02 * before.norm()


def test_merged_int8_is_within_the_rounding_of_activations(folder: Path) -> None:
    lm = adapted(folder, "int8")
    before = logits(lm)
    after = logits(merge_adapter(lm, torch.float32))
    assert (after - before).norm() < 0.04 * before.norm()


def test_the_merge_is_into_the_dequantized_base_and_not_the_original(folder: Path) -> None:
    lm = adapted(folder, "nf4")
    before = logits(lm)
    into_original = logits(merge_adapter(adapted(folder, "none"), torch.float32))
    into_dequantized = logits(merge_adapter(lm, torch.float32))
    assert (into_dequantized - before).norm() < 0.01 * (into_original - before).norm()


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_merged_lm_is_a_plain_folder_that_gives_the_same_logits(
    quantization: str, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    merged = merge_adapter(adapted(folder, quantization), torch.float32)
    write_language_model(merged, tmp_path / "merged")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    assert {type(m) for m in loaded.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert (logits(loaded) - logits(merged)).abs().max() < 1e-5


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_tied_embeddings_stay_tied_through_a_merge(quantization: str, tiny_lm: TinyLM, tmp_path: Path) -> None:
    tiny_lm("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "lm")
    lm = adapted(tmp_path / "lm", quantization)
    before = logits(lm)
    merged: Any = merge_adapter(lm, torch.float32)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    write_language_model(merged, tmp_path / "merged")
    again = load_language_model(config(tmp_path / "merged", "none"), tmp_path / "merged")
    assert (logits(again) - before).norm() < (0.04 if quantization == "int8" else 1e-4) * before.norm()


def test_a_merged_lm_can_be_quantized_again(folder: Path, tmp_path: Path) -> None:
    write_language_model(merge_adapter(adapted(folder, "nf4"), torch.float32), tmp_path / "merged")
    again = load_language_model(config(tmp_path / "merged", "nf4"), tmp_path / "merged")
    assert logits(again).isfinite().all()


def test_an_adapter_that_does_more_than_add_is_refused(tiny_lm: TinyLM) -> None:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    lm = get_peft_model(tiny_lm("llama"), PeftLoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ExportError, match="modules_to_save"):
        merge_adapter(lm, torch.float32)
