"""Loading, NF4 and LoRA on tiny models of the real classes: Llama, Phi-3 and phi-2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from mmllm_core import language
from mmllm_core.config import LanguageConfig, LoraConfig, PathSource
from mmllm_core.errors import ConfigError, WeightsError
from mmllm_core.language import (
    add_adapter,
    compute_dtype,
    interpolate_adapter,
    load_adapter,
    load_embeddings,
    load_language_model,
    load_tokenizer,
    stop_token_ids,
    unfreeze,
)
from tests.conftest import MakeTokenizer, TinyLM

FAMILIES = ["llama", "phi3", "phi"]


def config(folder: Path, quantization: str = "none", dtype: str = "float32") -> LanguageConfig:
    return LanguageConfig(source=PathSource(path=folder), quantization=quantization, dtype=dtype)  # type: ignore[arg-type]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tiny_lm: TinyLM, tmp_path: Path) -> Path:
    tiny_lm(request.param).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_embeddings_are_loaded_without_the_layers(folder: Path) -> None:
    whole = load_language_model(config(folder), folder)
    found = load_embeddings(config(folder), folder)
    ids = torch.arange(300)
    assert torch.equal(found.get_input_embeddings()(ids), whole.get_input_embeddings()(ids))
    assert len(found.base_model.layers) == 0
    assert sum(p.numel() for p in found.parameters()) < sum(p.numel() for p in whole.parameters())
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no causal LM"):
        load_embeddings(config(folder), folder)


def loss_of(lm: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    return lm(input_ids=ids, labels=ids).loss


def test_a_loaded_lm_is_frozen_and_in_eval_mode(folder: Path) -> None:
    lm = load_language_model(config(folder), folder)
    assert not lm.training
    assert not any(p.requires_grad for p in lm.parameters())


def test_a_fresh_adapter_changes_nothing_and_covers_every_linear_of_a_block(folder: Path) -> None:
    lm = load_language_model(config(folder), folder)
    before = loss_of(lm)
    adapted = add_adapter(lm, LoraConfig(rank=4))
    assert torch.allclose(loss_of(adapted), before)
    blocks = adapted.get_base_model().model.layers
    linears = [n for n, m in blocks.named_modules() if type(m) is torch.nn.Linear and "lora_" not in n]
    assert linears
    assert all(name.endswith("base_layer") for name in linears), "a linear layer of a block has no LoRA"


def test_nf4_quantizes_every_linear_of_a_block_and_keeps_the_head(folder: Path) -> None:
    lm: Any = load_language_model(config(folder, "nf4", "bfloat16"), folder)
    weights = [m.weight for m in lm.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert weights
    assert {getattr(weight, "quant_type", None) for weight in weights} == {"nf4"}
    computed = getattr(torch, compute_dtype("bfloat16", "cpu"))
    assert {weight.dtype for weight in weights} == {computed}, "ZeRO shards no integers"
    assert type(lm.lm_head) is torch.nn.Linear


def test_int8_quantizes_every_linear_of_a_block_and_keeps_the_head(folder: Path) -> None:
    lm: Any = load_language_model(config(folder, "int8", "bfloat16"), folder)
    weights = [m.weight for m in lm.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert weights
    assert {weight.dtype for weight in weights} == {torch.int8}
    assert type(lm.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_int8_stays_near_the_lm_it_came_from(dtype: str, folder: Path) -> None:
    exact = loss_of(load_language_model(config(folder), folder))
    assert abs(float(loss_of(load_language_model(config(folder, "int8", dtype), folder)) - exact)) < 0.05


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_lm_learns_through_its_adapter_and_a_saved_adapter_gives_the_same_loss(
    quantization: str, folder: Path, tmp_path: Path
) -> None:
    settings = config(folder, quantization, "bfloat16")
    adapted = add_adapter(load_language_model(settings, folder), LoraConfig(rank=4)).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = loss_of(adapted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = load_adapter(load_language_model(settings, folder), tmp_path / "adapter")
    assert torch.allclose(loss_of(again), loss_of(adapted), atol=1e-2)


def test_the_first_layers_alone_are_adapted(folder: Path) -> None:
    adapted = add_adapter(load_language_model(config(folder), folder), LoraConfig(rank=4, layers=1))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".layers.0." in name for name in trained)
    with pytest.raises(ConfigError, match=r"lora\.layers: 3 and the LM has only 2 layers"):
        add_adapter(load_language_model(config(folder), folder), LoraConfig(layers=3))


def test_an_adapter_may_be_taken_half_the_way(folder: Path) -> None:
    lm = load_language_model(config(folder), folder)
    adapted: Any = add_adapter(lm, LoraConfig(rank=4))
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    whole = [layer.get_delta_weight("default") for layer in layers]
    plain = {name: weight.clone() for name, weight in adapted.named_parameters() if "lora_B" not in name}
    interpolate_adapter(dict(adapted.named_parameters()), 0.5)
    for layer, delta in zip(layers, whole, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * delta)
    assert all(torch.equal(dict(adapted.named_parameters())[name], weight) for name, weight in plain.items())


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_training_at_rate_0_keeps_its_loss_through_evaluations(quantization: str, folder: Path) -> None:
    adapted = add_adapter(load_language_model(config(folder, quantization, "bfloat16"), folder), LoraConfig(rank=4))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.0)
    losses = []
    for _ in range(3):
        adapted.train()
        loss = loss_of(adapted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        adapted.eval()
        with torch.no_grad():
            loss_of(adapted)
    assert len(set(losses)) == 1


def test_an_unfrozen_lm_learns_in_the_dtype_that_it_has(folder: Path) -> None:
    lm = load_language_model(config(folder, "none", "bfloat16"), folder)
    unfreeze(lm)
    before = {name: parameter.detach().clone() for name, parameter in lm.named_parameters()}
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    loss_of(lm).backward()
    optimizer.step()
    for name, parameter in lm.named_parameters():
        assert parameter.dtype == getattr(torch, compute_dtype("bfloat16", "cpu"))
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_are_not_unfrozen(quantization: str, folder: Path) -> None:
    lm = load_language_model(config(folder, quantization, "bfloat16"), folder)
    with pytest.raises(ConfigError, match="quantized weights cannot be trained"):
        unfreeze(lm)
    assert not any(p.requires_grad for p in lm.parameters())


def test_an_lm_with_an_adapter_is_not_unfrozen(folder: Path) -> None:
    adapted = add_adapter(load_language_model(config(folder), folder), LoraConfig(rank=4))
    with pytest.raises(ConfigError, match="leave 'lora' out"):
        unfreeze(adapted)  # type: ignore[arg-type]


def test_bitsandbytes_would_repack_nf4_weights_of_an_evaluated_lm_if_it_were_let(folder: Path) -> None:
    """What the test above guards against, shown to happen where the CPU has the instructions for it."""
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks only on CPUs with AVX512-BF16")
    lm: Any = load_language_model(config(folder, "nf4", "bfloat16"), folder)
    layers = [m for m in lm.modules() if isinstance(m, Linear4bit)]

    def bytes_held() -> list[Any]:
        return [layer.weight.data.view(torch.uint8).numpy().tobytes() for layer in layers]

    before = bytes_held()
    with torch.no_grad():
        loss_of(lm)
    assert bytes_held() == before
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        loss_of(lm)
    assert bytes_held() != before


def test_an_unknown_architecture_asks_for_target_modules(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    lm = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ConfigError, match="target_modules"):
        add_adapter(lm, LoraConfig())
    assert add_adapter(lm, LoraConfig(target_modules=("dense",))) is not None


def test_a_folder_without_weights_is_one_named_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=str(tmp_path)):
        load_language_model(config(tmp_path), tmp_path)
    with pytest.raises(WeightsError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_template_speaks_phi2(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer(None).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "Instruct: hi\nOutput: "


def test_answers_end_at_the_end_of_turn_token(tiny_lm: TinyLM, tokenizer: Any) -> None:
    ids = stop_token_ids(tiny_lm("phi3"), tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ids
    assert tokenizer.convert_tokens_to_ids("<|end|>") in ids
    assert tokenizer.eos_token_id in ids


@pytest.fixture
def phi3_folder(tiny_lm: TinyLM, tmp_path: Path) -> Path:
    tiny_lm("phi3").save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_weights_that_are_cut_off_are_one_named_error(phi3_folder: Path) -> None:
    path = phi3_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="no causal LM"):
        load_language_model(config(phi3_folder), phi3_folder)


def test_a_tensor_that_is_missing_is_named_and_never_random(phi3_folder: Path) -> None:
    path = phi3_folder / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.self_attn.o_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lack 1 tensors, such as 'model\.layers\.1\.self_attn\.o_proj\.weight'"):
        load_language_model(config(phi3_folder), phi3_folder)


def test_tensors_of_another_shape_are_one_named_error(phi3_folder: Path) -> None:
    path = phi3_folder / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"] = state["model.norm.weight"][:3].clone()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="shapes"):
        load_language_model(config(phi3_folder), phi3_folder)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_tied_embeddings_are_not_missing(quantization: str, tiny_lm: TinyLM, tmp_path: Path) -> None:
    tiny_lm("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "lm")
    lm = load_language_model(config(tmp_path / "lm", quantization, "bfloat16"), tmp_path / "lm")
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("able", [True, False])
def test_a_cpu_without_bfloat16_instructions_computes_in_float32(
    able: bool, quantization: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "multiplies_bfloat16", lambda: able)
    settings = config(folder, quantization, "bfloat16")
    adapted: Any = add_adapter(load_language_model(settings, folder), LoraConfig(rank=4))
    loss = loss_of(adapted)
    loss.backward()
    assert adapted(torch.tensor([[1, 2]])).logits.dtype == (torch.bfloat16 if able else torch.float32)
    assert [compute_dtype(dtype, "cpu") for dtype in ("float32", "float16")] == ["float32", "float16"]  # type: ignore[arg-type]
    assert compute_dtype("bfloat16", "cuda") == "bfloat16"
