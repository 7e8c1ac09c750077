"""A plan of a recipe: what it says of tokens, hours and what fits, from configs alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmllm_core.config import ChatData, DataConfig, LearningRates, Recipe, VisionConfig, ZeroConfig
from mmllm_core.config.profile import HubSource, PathSource
from mmllm_core.errors import ConfigError, ConversationError, WeightsError
from mmllm_core.models.profile import load_profile
from tests.conftest import TinyLM, tiny_lm_config
from tests.phi4_mini import PHI4_MINI
from train_jobs.batch_estimate import batch_estimator
from train_jobs.model_shape import read_lm_config
from train_jobs.origins import find_origins
from train_jobs.plan import HEAD_ROOM, PlanOptions, plan
from train_jobs.vision_shape import vision_shape


@pytest.fixture
def lm_shape(tokenizer: Any, tmp_path: Path) -> Path:
    """A tiny LM's `config.json`, with a tokenizer beside it."""
    folder = tmp_path / "lm"
    tokenizer.save_pretrained(folder)
    tiny_lm_config("llama").save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Chats of two lengths."""
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": "Blue."}]
        for question in ("What?", "What colour is the circle? " * 4)
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns), encoding="utf-8")
    data = DataConfig(sources=(ChatData(file=file),))
    rates = LearningRates(connector=1e-3, lm=1e-3)
    return Recipe(
        name="tiny",
        profile="embedded",
        stage="instruct",
        steps=10,
        batch_size=32,
        micro_batch=4,
        data=data,
        learning_rates=rates,
    )


@pytest.fixture
def phi_shape(tmp_path: Path) -> Path:
    """Phi-4-mini's `config.json`, with nothing beside it."""
    path = tmp_path / "phi" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"model_type": "phi3", **PHI4_MINI}), encoding="utf-8")
    return path


@pytest.fixture
def phi_recipe(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"profile": "phi"})


def test_tokens_are_counted_in_rendered_conversations(recipe: Recipe, lm_shape: Path) -> None:
    made = plan(recipe, PlanOptions("H100", 8, lm_shape=lm_shape))
    assert "64 of the recipe's conversations" in made.batches.source
    assert made.batches.mean < made.batches.longest < load_profile("embedded").language.context_length
    assert made.batches.mean < made.batches.mean_conversation, "the system message stands once"
    assert made.tokens == pytest.approx(10 * 32 * made.batches.mean)


def test_a_step_is_the_same_for_any_number_of_workers(recipe: Recipe, lm_shape: Path) -> None:
    plans = [plan(recipe, PlanOptions("H100", workers, lm_shape=lm_shape)) for workers in (1, 2, 8)]
    assert [made.accumulation for made in plans] == [8, 4, 1]
    assert plans[0].tokens == pytest.approx(plans[2].tokens, rel=0.1)
    with pytest.raises(ConfigError, match="batch_size of 32"):
        plan(recipe, PlanOptions("H100", 33, lm_shape=lm_shape))


def test_packed_rows_are_counted_as_rows(recipe: Recipe, lm_shape: Path) -> None:
    batching = recipe.batching.model_copy(update={"pack_tokens": 256})
    plain = plan(recipe, PlanOptions("H100", 8, lm_shape=lm_shape)).batches
    packed = plan(recipe.model_copy(update={"batching": batching}), PlanOptions("H100", 8, lm_shape=lm_shape)).batches
    assert packed.mean > 1.5 * plain.mean
    assert packed.longest <= 256


def test_without_a_tokenizer_rows_are_as_long_as_they_may_be(phi_recipe: Recipe, phi_shape: Path) -> None:
    made = plan(phi_recipe, PlanOptions("H100", 8, lm_shape=phi_shape))
    assert made.batches.longest == made.batches.n_supervised == load_profile("phi").language.context_length
    assert made.batches.source.startswith("a bound")
    assert "holds no tokenizer" in made.batches.source


def test_a_conversation_that_does_not_fit_is_named(recipe: Recipe, lm_shape: Path) -> None:
    batching = recipe.batching.model_copy(update={"pack_tokens": 40})
    with pytest.raises(ConversationError, match=r"sample 'chat/.*at most 40 fit"):
        plan(recipe.model_copy(update={"batching": batching}), PlanOptions("H100", 8, lm_shape=lm_shape))


def test_the_recommended_setting_is_the_largest_that_leaves_head_room(phi_recipe: Recipe, phi_shape: Path) -> None:
    large = phi_recipe.model_copy(update={"batch_size": 8 * 64})
    made = plan(large, PlanOptions("H100", 8, lm_shape=phi_shape))
    best = made.recommended
    assert best is not None
    assert best.micro_batch & (best.micro_batch - 1) == 0
    assert best.memory.total <= (1 - HEAD_ROOM) * made.accelerator.memory
    doubled = large.model_copy(update={"micro_batch": 2 * best.micro_batch})
    larger = plan(doubled, PlanOptions("H100", 8, lm_shape=phi_shape)).stages[best.zero_stage]
    assert larger.refused is not None
    assert "H100" in larger.refused


def test_a_recommended_micro_batch_is_counted_as_if_it_were_written(recipe: Recipe, lm_shape: Path) -> None:
    """Also what its conversations share and are filled up with, which depends on how many there are."""
    options = PlanOptions("H100", 1, lm_shape=lm_shape)
    source = recipe.data.sources[0]
    assert isinstance(source, ChatData)
    question = {"role": "user", "content": "What colour is the circle? " * 3}
    unlike = {"messages": [question, {"role": "assistant", "content": "Blue."}]}
    with source.file.open("a", encoding="utf-8") as chats:
        chats.write(json.dumps(unlike) + "\n")
    made = plan(recipe.model_copy(update={"micro_batch": 1}), options)
    best = made.recommended
    assert best is not None
    assert best.micro_batch > 1
    written = plan(recipe.model_copy(update={"micro_batch": best.micro_batch}), options)
    assert best.memory == written.stages[best.zero_stage].memory
    assert made.batches.keys == 1
    assert written.batches.keys > written.batches.queries > 1


def test_no_micro_batch_is_recommended_that_a_step_cannot_fill(phi_recipe: Recipe, phi_shape: Path) -> None:
    short = phi_recipe.model_copy(
        update={"batch_size": 24, "batching": phi_recipe.batching.model_copy(update={"pack_tokens": 128})}
    )
    best = plan(short, PlanOptions("H100", 8, lm_shape=phi_shape)).recommended
    assert best is not None
    assert best.micro_batch == 2


def test_where_nothing_fits_nothing_is_recommended(phi_recipe: Recipe, phi_shape: Path) -> None:
    made = plan(phi_recipe, PlanOptions("L4", 8, lm_shape=phi_shape))
    assert made.recommended is None
    assert made.as_written.refused is not None


def test_what_the_code_cannot_do_is_refused_by_name(recipe: Recipe, lm_shape: Path, tmp_path: Path) -> None:
    values = load_profile("embedded").model_dump(mode="json")
    values["language"]["quantization"] = "int8"
    path = tmp_path / "int8.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    made = plan(recipe.model_copy(update={"profile": str(path)}), PlanOptions("H100", 8, lm_shape=lm_shape))
    assert [choice.refused is None for choice in made.stages] == [True, True, True, False]
    assert "int8" in str(made.stages[3].refused)


def test_an_offloaded_optimizer_needs_a_stage_that_can(recipe: Recipe, lm_shape: Path) -> None:
    zero = ZeroConfig(stage=2, offload_optimizer=True)
    made = plan(recipe.model_copy(update={"zero": zero}), PlanOptions("H100", 8, lm_shape=lm_shape))
    assert "offload_optimizer" in str(made.stages[0].refused)
    assert made.as_written.memory.optimizer == 0


def test_checkpointing_trades_memory_for_time(phi_recipe: Recipe, phi_shape: Path) -> None:
    saving = phi_recipe.model_copy(update={"gradient_checkpointing": True})
    plain, slow = (plan(r, PlanOptions("H100", 8, lm_shape=phi_shape)) for r in (phi_recipe, saving))
    assert slow.as_written.memory.activations < 0.2 * plain.as_written.memory.activations
    assert plain.hours < slow.hours < 1.5 * plain.hours
    assert plain.flops == slow.flops


def test_hours_follow_from_operations_speed_and_mfu(phi_recipe: Recipe, phi_shape: Path) -> None:
    options = PlanOptions("H100", 8, mfu=0.4, lm_shape=phi_shape)
    made = plan(phi_recipe, options)
    assert made.hours == pytest.approx(made.flops / (8 * 989.4e12 * 0.4) / 3600)
    slower = plan(phi_recipe, replace(options, mfu=0.2))
    assert slower.hours == pytest.approx(2 * made.hours)
    a_token = 4 * made.model.n_linear + 6 * made.model.n_trained_lm
    assert made.tokens * a_token < made.flops < 2 * made.tokens * a_token


def test_phis_clip_is_known_without_the_hub() -> None:
    shape = vision_shape(load_profile("phi").vision)
    assert (shape.d_vision, shape.n_patches) == (1024, 24 * 24)


@pytest.mark.usefixtures("no_hub")
def test_a_clip_that_nobody_lists_must_be_fetched() -> None:
    source = HubSource(repo="nobody/nothing", revision="0" * 40)
    with pytest.raises(WeightsError, match="nobody/nothing"):
        vision_shape(VisionConfig(source=source))


@pytest.mark.usefixtures("no_hub")
def test_an_lm_out_of_reach_names_the_way_round() -> None:
    with pytest.raises(WeightsError, match="--lm-shape"):
        read_lm_config(load_profile("phi"))


@pytest.mark.parametrize("text", ["{}", "{", '{"model_type": "nothing"}'])
def test_a_config_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        read_lm_config(load_profile("phi"), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "clip", "lfm2"])
def test_models_of_another_build_are_refused(model_type: str, recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"'{model_type}'") as caught:
        plan(recipe, PlanOptions("H100", 1, lm_shape=path))
    assert "\n" not in str(caught.value)


def test_training_refuses_such_an_lm_before_it_is_loaded(recipe: Recipe, tiny_lm: TinyLM, tmp_path: Path) -> None:
    tiny_lm("gpt2").save_pretrained(tmp_path)
    embedded = load_profile("embedded")
    language = embedded.language.model_copy(update={"source": PathSource(path=tmp_path)})
    with pytest.raises(ConfigError, match="'gpt2': such LMs cannot be trained"):
        find_origins(recipe, embedded.model_copy(update={"language": language}))


@pytest.mark.parametrize(("options", "named"), [(PlanOptions("B7", 1), "H200"), (PlanOptions("H100", 1, mfu=2), "mfu")])
def test_wrong_options_are_named(options: PlanOptions, named: str, recipe: Recipe, lm_shape: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        plan(recipe, replace(options, lm_shape=lm_shape))


def test_unadaptable_lms_are_refused(recipe: Recipe, lm_shape: Path) -> None:
    lora = recipe.lora
    assert lora is not None
    wrong = recipe.model_copy(update={"lora": lora.model_copy(update={"target_modules": ("nothing",)})})
    with pytest.raises(ConfigError, match="target_modules"):
        plan(wrong, PlanOptions("H100", 1, lm_shape=lm_shape))


@pytest.mark.parametrize("kind", ["linear", "mlp", "resampler", "cross_attention"])
def test_every_connector_can_be_planned(kind: str, recipe: Recipe, lm_shape: Path, tmp_path: Path) -> None:
    values = load_profile("embedded").model_dump(mode="json") | {"connector": {"kind": kind}}
    if kind == "cross_attention":
        values["connector"]["every_k_layers"] = 1
    path = tmp_path / "profile.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    made = plan(recipe.model_copy(update={"profile": str(path)}), PlanOptions("H100", 1, lm_shape=lm_shape))
    assert made.model.n_connector > 0
    assert made.model.connector_bytes > 0
    assert (made.model.cross_attention_bytes > 0) == (kind == "cross_attention")


def test_images_lengthen_rows(tokenizer: Any, recipe: Recipe, tmp_path: Path) -> None:
    row = {
        "id": "a",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}],
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    data = {"sources": [{"dataset": "llava", "file": str(tmp_path / "rows.json")}]}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with_images = recipe.model_copy(update={"data": DataConfig.model_validate(data)})
    profile = load_profile("embedded")
    few, many = (batch_estimator(with_images, profile, n, 2, tmp_path / "tokenizer")(4) for n in (5, 50))
    assert many.mean - few.mean == 45
    assert few.n_images == 1


@pytest.mark.parametrize("stage", ["align", "text", "end_to_end"])
def test_every_stage_can_be_planned(stage: str, recipe: Recipe, lm_shape: Path) -> None:
    values = recipe.model_dump(mode="json") | {"stage": stage}
    rates = {"align": {"connector": 1e-3}, "text": {"lm": 1e-3}}
    values["learning_rates"] = rates.get(stage, {"connector": 1e-3, "lm": 1e-3, "vision": 1e-5})
    if stage == "align":
        values["lora"] = None
    if stage == "end_to_end":
        values["features"] = "real_time"
    made = plan(Recipe.model_validate(values), PlanOptions("H100", 2, lm_shape=lm_shape))
    assert made.as_written.refused is None
    assert (made.model.tower is not None) == (stage == "end_to_end")
    assert (made.model.n_trained_tower > 0) == (stage == "end_to_end")
    assert (made.model.n_trained_lm > 0) == (stage != "align")
    assert (made.model.n_trained_connector > 0) == (stage != "text")
