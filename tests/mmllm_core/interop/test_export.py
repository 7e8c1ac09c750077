"""Exports as folders: whole or absent, never over other files; merged LMs and bundles say what the bundle said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import Tensor

from mmllm_core.bundle import Bundle
from mmllm_core.config import ConnectorConfig, CrossAttentionConfig, ResamplerConfig
from mmllm_core.errors import ExportError
from mmllm_core.interop.export import export_llava, export_merged_bundle, export_merged_lm
from mmllm_core.vision import file_sha256


@torch.inference_mode()
def logits_of(bundle: Bundle) -> Tensor:
    model = bundle.load_model()
    features = torch.randn(1, bundle.info.n_patches, bundle.info.d_vision, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, *[-200] * bundle.info.n_patches, 9, 10]])
    return model.lm(inputs_embeds=model.embed(ids, features)).logits.float()


@pytest.mark.parametrize("lm", ["llama", "phi3", "phi"])
def test_a_merged_bundle_opens_as_any_bundle_with_the_same_logits(lm: str, make_bundle: Any) -> None:
    bundle = make_bundle(lm, quantization="nf4")
    merged = Bundle.open(export_merged_bundle(bundle, "merged").folder)
    assert not (merged.folder / "adapter").exists()
    assert not any(isinstance(module, Linear4bit) for module in merged.load_model().modules())
    assert (logits_of(merged) - logits_of(bundle)).abs().max() < 1e-4
    assert merged.load_vision().fingerprint == bundle.info.feature_fingerprint


@pytest.mark.parametrize("connector", [ResamplerConfig(n_queries=4), CrossAttentionConfig(every_k_layers=1)])
def test_a_merged_bundle_keeps_its_connector_whatever_its_kind(connector: ConnectorConfig, make_bundle: Any) -> None:
    bundle = make_bundle("llama", quantization="nf4", connector=connector)
    merged = export_merged_bundle(bundle, "merged")
    assert merged.profile.connector == connector
    before, after = (load_file(b.folder / "connector.safetensors") for b in (bundle, merged))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    text = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        expected, found = (b.load_model().causal_lm(input_ids=text).logits for b in (bundle, merged))
    assert (expected - found).abs().max() < 1e-4


def test_a_merged_bundle_records_what_was_merged_and_how(make_bundle: Any) -> None:
    bundle = make_bundle(quantization="nf4", dtype="bfloat16")
    record = export_merged_bundle(bundle, "merged").info.merged
    assert record is not None
    assert record.bundle == "trained"
    assert record.quantization == "nf4"
    assert record.dtype == "bfloat16"
    assert record.adapter_sha256 == file_sha256(bundle.folder / "adapter" / "adapter_model.safetensors")
    assert bundle.info.merged is None


def test_what_was_merged_is_told_of_exports_of_the_merged_bundle_too(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(quantization="nf4")
    merged = export_merged_bundle(bundle, "merged")
    export_llava(merged, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "nf4 quantization" in card
    assert file_sha256(bundle.folder / "adapter" / "adapter_model.safetensors") in card


def test_a_merged_bundle_keeps_the_last_bundle_the_last(make_bundle: Any) -> None:
    bundle = make_bundle()
    export_merged_bundle(bundle, "merged")
    assert Bundle.latest().info.name == bundle.info.name


def test_a_merged_bundle_does_not_replace_the_bundle_that_it_is_made_of(make_bundle: Any) -> None:
    bundle = make_bundle()
    with pytest.raises(ExportError, match="name of its own"):
        export_merged_bundle(bundle, "trained")
    Bundle.open(bundle.folder)


@pytest.mark.parametrize("lm", ["llama", "phi3", "phi"])
def test_a_merged_lm_opens_in_plain_transformers_with_the_same_text(lm: str, make_bundle: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bundle = make_bundle(lm, quantization="nf4")
    export_merged_lm(bundle, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    messages = [{"role": "user", "content": "What is there?"}]
    assert tokenizer.apply_chat_template(messages) == bundle.tokenizer.apply_chat_template(messages)
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", add_generation_prompt=True)
    texts = [
        tokenizer.decode(lm.generate(**ids, max_new_tokens=12, do_sample=False)[0])
        for lm in (plain, bundle.load_model().lm)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("export", [export_llava, export_merged_lm])
def test_a_folder_that_holds_files_is_left_alone(export: Any, make_bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="not an empty folder"):
        export(make_bundle(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_refused_export_leaves_nothing_behind(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(merge=2)
    with pytest.raises(ExportError, match="patches"):
        export_llava(bundle, tmp_path / "exports" / "out")
    assert list((tmp_path / "exports").iterdir()) == []
