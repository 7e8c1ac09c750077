"""The arithmetic of a plan: known numbers, what moves which way, and formulas held against what autograd keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmllm_core.config import LoraConfig, Recipe, parse_config
from mmllm_core.language import add_adapter
from mmllm_core.model import MultimodalLM
from mmllm_core.models.profile import load_profile
from mmllm_core.packed_attention import Packing, attend_packed
from tests.phi4_mini import PHI4_MINI
from train_jobs.kept_bytes import kept_bytes
from train_jobs.memory_model import (
    BatchShape,
    Setting,
    activation_bytes,
    activation_bytes_per_position,
    bytes_per_weight,
    checkpoint_bytes,
    logit_bytes,
    memory,
    weight_bytes,
)
from train_jobs.model_shape import AdapterShape, ModelShape, model_shape
from train_jobs.throughput import ModelWork
from train_jobs.vision_shape import TowerShape

ADAPTER = AdapterShape(n_layers=2, n_parameters=300, per_layer_rank=14, per_layer_inputs=64, dropout=0.0)
SMALL = ModelShape(
    model_type="llama",
    d_model=8,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=4,
    d_feed_forward=16,
    vocabulary=100,
    n_linear=1000,
    n_kept=900,
    largest_linear=128,
    quantization="nf4",
    dtype_bytes=2,
    adapter=ADAPTER,
    n_connector=100,
    connector_bytes=50.0,
    cross_attention_bytes=0.0,
    image_positions=4,
    n_features=4,
)
BATCH = BatchShape(rows=2, length=10, n_supervised=3, n_images=1)
CPU = Setting(zero_stage=0, workers=4, gpu=False, runtime=7.0, slack=0.5)
GPU = replace(CPU, gpu=True)


def test_nf4_takes_half_a_byte_and_an_eighth_of_a_bit() -> None:
    assert bytes_per_weight("nf4", 2) == pytest.approx(0.5 + 0.127 / 8, abs=1e-4)
    assert bytes_per_weight("int8", 2) == 1
    assert bytes_per_weight("none", 4) == 4


def test_only_linear_layers_are_quantized() -> None:
    assert weight_bytes(SMALL) == pytest.approx(1000 * 0.515869140625 + 900 * 2)


def test_zero_shares_what_the_paper_says_by_stage() -> None:
    """400 trainable parameters on 4 workers: 2, 2 (4 where gradients are added up in float32) and 12 bytes each."""
    found = [memory(SMALL, BATCH, replace(GPU, zero_stage=stage)) for stage in (0, 1, 2, 3)]  # type: ignore[arg-type]
    assert [m.trainable for m in found] == [800, 800, 800, 200]
    assert [m.gradients for m in found] == [800, 800, 400, 400]
    assert [m.optimizer for m in found] == [4800, 1200, 1200, 1200]
    assert found[3].weights == pytest.approx(weight_bytes(SMALL) / 4 + 128 * bytes_per_weight("nf4", 2))


def test_on_cpu_the_lm_lies_in_its_mapped_file_but_for_what_is_quantized() -> None:
    found = memory(SMALL, BATCH, CPU)
    assert found.mapped == 2 * 1900
    assert found.weights == pytest.approx(1000 * bytes_per_weight("nf4", 2))
    assert memory(replace(SMALL, quantization="none"), BATCH, CPU).weights == 0
    assert memory(SMALL, BATCH, GPU).mapped == 0
    converted = memory(replace(SMALL, dtype_bytes=4), BATCH, CPU)
    assert converted.mapped == 0
    assert converted.weights == pytest.approx(weight_bytes(replace(SMALL, dtype_bytes=4)))


def test_the_allocator_takes_its_share_of_what_a_step_adds() -> None:
    found = memory(SMALL, BATCH, CPU)
    assert found.slack == pytest.approx(0.5 * (found.activations + found.logits + found.working))


def test_activations_of_a_small_layer_by_hand() -> None:
    """8 h + 8 + 6 f + 4 h + 2 f, 4 a d, 4 g d, 4 a and 2 a d, 2 r; twice, and 4 h + 4 for the last norm."""
    layer = 8 * 8 + 8 + 6 * 16 + 4 * 8 + 2 * 16 + 4 * 8 + 4 * 4 + 4 * 2 + 2 * 8 + 2 * 14
    assert activation_bytes_per_position(SMALL) == 2 * layer + 4 * 8 + 4
    filled = layer + 0.25 * (4 * 8 + 4 * 4 + 4 * 2)
    assert activation_bytes_per_position(SMALL, 1.25, 1.25) == 2 * filled + 4 * 8 + 4
    adapted_once = replace(SMALL, adapter=replace(ADAPTER, n_layers=1))
    assert activation_bytes_per_position(adapted_once) == 2 * layer - (4 * 8 + 2 * 16 + 2 * 8 + 2 * 14) + 4 * 8 + 4
    shared = layer - 4 * 4 + 1.5 * 4 * 8
    assert activation_bytes_per_position(SMALL, 1, 1.5) == 2 * shared + 4 * 8 + 4


def test_logits_are_counted_at_supervised_positions_alone() -> None:
    assert logit_bytes(SMALL, BATCH, CPU) == 6 * 100 * (2 + 4) + 6 * 2 * 8


def test_a_loss_in_chunks_holds_a_chunk_of_logits_and_what_the_backward_pass_needs() -> None:
    chunked = replace(CPU, logits_at_once=250, floats_at_once=50)
    assert logit_bytes(SMALL, BATCH, chunked) == 250 * 2 + 50 * 4 + 6 * 2 * 8
    whole = replace(SMALL, adapter=None, quantization="none")
    assert logit_bytes(whole, BATCH, chunked) == logit_bytes(SMALL, BATCH, chunked) + 4 * 100 * 8


def test_checkpointing_keeps_inputs_of_layers_and_one_layer_whole() -> None:
    deep = replace(SMALL, n_layers=10, adapter=replace(ADAPTER, n_layers=10))
    one = activation_bytes_per_position(SMALL) - activation_bytes_per_position(
        replace(SMALL, n_layers=1, adapter=replace(ADAPTER, n_layers=1))
    )
    saving = replace(CPU, gradient_checkpointing=True)
    assert activation_bytes(deep, saving, BATCH) == pytest.approx(2 * 10 * (10 * 2 * 8 + one) + 2 * 50, rel=0.02)
    assert activation_bytes(deep, saving, BATCH) < 0.3 * activation_bytes(deep, CPU, BATCH)
    first_alone = replace(deep, adapter=replace(ADAPTER, n_layers=1))
    assert activation_bytes(first_alone, saving, BATCH) == activation_bytes(deep, saving, BATCH), "the largest layer"


def test_offloading_takes_the_optimizer_and_parameters_off_the_gpu() -> None:
    here, there = (
        memory(SMALL, BATCH, replace(GPU, zero_stage=3, offload_optimizer=away, offload_parameters=away))
        for away in (False, True)
    )
    assert (there.optimizer, there.gradients, there.trainable) == (0, 0, 0)
    assert there.weights == pytest.approx(128 * bytes_per_weight("nf4", 2))
    assert here.optimizer > 0
    on_cpu = memory(SMALL, BATCH, replace(CPU, zero_stage=2, offload_optimizer=True))
    assert on_cpu.optimizer == memory(SMALL, BATCH, replace(CPU, zero_stage=2)).optimizer


def test_what_a_stage_does_not_train_has_no_gradients() -> None:
    align = replace(SMALL, adapter=None, trained=("connector",))
    text = replace(SMALL, trained=("lm",))
    assert memory(align, BATCH, GPU).gradients == 2 * 100
    assert memory(text, BATCH, GPU).gradients == 2 * 300
    assert text.n_parameters == SMALL.n_parameters


def test_an_lm_that_is_trained_whole_is_no_frozen_weight() -> None:
    whole = replace(SMALL, adapter=None, quantization="none")
    found = memory(whole, BATCH, GPU)
    assert whole.n_trainable == 1000 + 900 + 100
    assert found.weights == 0
    assert found.optimizer == 12 * 2000


def test_a_large_optimizer_step_may_be_the_peak() -> None:
    """Gradients in float32 at once, after activations have gone."""
    whole = replace(SMALL, adapter=None, quantization="none", n_linear=10**9)
    found = memory(whole, BATCH, GPU)
    transient = found.activations + found.logits + found.working
    assert found.update == pytest.approx(4 * whole.n_trainable - transient)
    assert memory(SMALL, BATCH, GPU).update == 0


def test_clips_tower_counts_where_it_runs() -> None:
    tower = TowerShape(n_parameters=500, n_patches=5, kept_bytes=70.0)
    frozen = memory(replace(SMALL, tower=tower), BATCH, GPU)
    trained = memory(replace(SMALL, tower=tower, trained=("connector", "lm", "vision")), BATCH, GPU)
    without = memory(SMALL, BATCH, GPU)
    assert frozen.weights - without.weights == 4 * 500
    assert frozen.activations == without.activations
    assert trained.optimizer - without.optimizer == 12 * 500
    assert trained.activations - without.activations == 2 * 70


def test_work_is_that_of_the_built_model(tiny_lm: Any) -> None:
    from mmllm_core.connectors import LmShape, build_connector

    lm = tiny_lm("phi3").requires_grad_(False)
    profile = load_profile("embedded")
    shape = model_shape(profile, recipe_of(LoraConfig(rank=4)), lm.config)
    connector = build_connector(profile.connector, 96, LmShape.of(lm.config))
    built = ModelWork.of(MultimodalLM(add_adapter(lm, LoraConfig(rank=4)), connector))
    planned = shape.work
    assert planned.n_connector == pytest.approx(built.n_connector, rel=0.05)  # biases and norms
    assert replace(planned, n_connector=built.n_connector) == built


@pytest.mark.parametrize("gpu", [False, True])
def test_a_higher_stage_takes_less(gpu: bool) -> None:
    """From stage 1 on: there DeepSpeed begins to allocate its reduce bucket."""
    stages = (1, 2, 3) if gpu else (0, 1, 2, 3)
    peaks = [memory(_phi4(), BATCH, replace(CPU, zero_stage=s, gpu=gpu)).total for s in stages]  # type: ignore[arg-type]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_more_rows_and_longer_rows_take_more() -> None:
    by_rows = [memory(SMALL, replace(BATCH, rows=rows), CPU).total for rows in (1, 2, 4, 8)]
    by_length = [memory(SMALL, replace(BATCH, length=length), CPU).total for length in (10, 20, 40)]
    assert by_rows == sorted(set(by_rows))
    assert by_length == sorted(set(by_length))


def test_a_phi4_mini_qlora_checkpoint_takes_less_than_a_gibibyte() -> None:
    shape = _phi4()
    assert shape.n_linear + shape.n_kept == pytest.approx(3.836e9, rel=1e-3)
    assert 1e7 < checkpoint_bytes(shape) < 2**30


@pytest.mark.lengthy
@pytest.mark.parametrize("model_type", ["llama", "phi3", "phi"])
@pytest.mark.parametrize(("n_shared", "lengths"), [(0, [32, 32]), (8, [32, 32]), (0, [32, 20]), (8, [32, 20])])
@pytest.mark.parametrize("trains", ["adapter", "attention", "first layers", "connector", "everything"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_are_what_autograd_keeps(
    tiny_lm: Any, model_type: str, n_shared: int, lengths: list[int], trains: str, dtype: Any
) -> None:
    """Three layers' worth less two's: what a layer keeps for its backward pass; with only two adapted, a plain one."""
    embedded = load_profile("embedded")
    profile = embedded.model_copy(update={"language": embedded.language.model_copy(update={"dtype": dtype})})
    kept = []
    lora = LoraConfig(rank=4) if trains in ("adapter", "attention") else None
    if trains == "first layers":
        lora = LoraConfig(rank=4, layers=2)
    if trains == "attention":
        names = {"phi3": ("qkv_proj", "o_proj"), "phi": ("q_proj", "dense"), "llama": ("q_proj", "v_proj", "o_proj")}
        lora = LoraConfig(rank=4, target_modules=names[model_type])
    recipe = whole_recipe() if trains == "everything" else recipe_of(lora)
    for n_layers in (2, 3):
        config = {"num_hidden_layers": n_layers, "hidden_act": "gelu_new" if model_type == "phi" else "silu"}
        lm = tiny_lm(model_type, **config).to(getattr(torch, dtype)).requires_grad_(trains == "everything")
        attend_packed(lm)
        shape = model_shape(profile, recipe, lm.config)
        if lora:
            lm = add_adapter(lm, lora).to(getattr(torch, dtype))
        base = (lm.get_base_model() if lora else lm).base_model.train()
        packing = Packing.of(lengths, n_shared)
        t = n_shared + sum(lengths)
        embeddings = torch.randn(1, t, 64, dtype=getattr(torch, dtype), requires_grad=True)  # (1, t, d_model)
        place = {"inputs_embeds": embeddings, "position_ids": packing.position_ids, "packing": packing}
        kept.append(kept_bytes(lambda b=base, p=place: b(use_cache=False, **p), base))
    read = (packing.n_queries / t, packing.n_keys / t)
    planned = activation_bytes_per_position(shape, *read)
    n_adapted = min(shape.adapter.n_layers, 2) if shape.adapter else 0
    fewer = replace(shape, n_layers=2, adapter=shape.adapter and replace(shape.adapter, n_layers=n_adapted))
    without = activation_bytes_per_position(fewer, *read)
    assert (planned - without) * t == pytest.approx(kept[1] - kept[0], rel=0.06)


def test_counts_are_those_of_the_built_model(tiny_lm: Any) -> None:
    from mmllm_core.connectors import LmShape, build_connector

    lm = tiny_lm("phi3").requires_grad_(False)
    profile = load_profile("embedded")
    shape = model_shape(profile, recipe_of(LoraConfig(rank=4)), lm.config)
    n_frozen = sum(p.numel() for p in lm.parameters())
    connector = build_connector(profile.connector, 96, LmShape.of(lm.config))
    model = MultimodalLM(add_adapter(lm, LoraConfig(rank=4)), connector)
    assert shape.n_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.n_linear + shape.n_kept == n_frozen


def recipe_of(lora: LoraConfig | None) -> Recipe:
    """A recipe that trains the connector, and an adapter if one is given."""
    values = {
        "name": "x",
        "profile": "embedded",
        "stage": "instruct" if lora else "align",
        "steps": 1,
        "lora": lora.model_dump() if lora else None,
        "learning_rates": {"connector": 1e-3} | ({"lm": 1e-3} if lora else {}),
    }
    return parse_config(Recipe, values, "recipe")


def whole_recipe() -> Recipe:
    """A recipe that trains the connector and the whole LM."""
    values = {"name": "x", "profile": "embedded", "stage": "end_to_end", "steps": 1, "lora": None}
    return parse_config(Recipe, values | {"learning_rates": {"connector": 1e-3, "lm": 1e-3}}, "recipe")


def _phi4() -> ModelShape:
    from transformers import AutoConfig

    config = AutoConfig.for_model("phi3", **PHI4_MINI)
    return model_shape(load_profile("phi"), recipe_of(LoraConfig()), config)
