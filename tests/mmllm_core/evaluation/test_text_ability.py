"""What is measured of an LM's plain text, before and after tuning."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from mmllm_core.config import CrossAttentionConfig, LoraConfig, MlpConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.errors import BundleError
from mmllm_core.evaluation.text_ability import (
    MAX_NEW_TOKENS,
    TextAbility,
    TextQuestion,
    accepts,
    adapter_disabled,
    compare,
    loss_per_token,
    measure,
    text_replies,
    text_set,
)
from mmllm_core.language import add_adapter, load_language_model
from mmllm_core.merging import merge_bundle
from mmllm_core.model import MultimodalLM
from tests.conftest import TinyLM
from tests.mmllm_core.interop.conftest import make_bundle  # noqa: F401, a fixture

PARAGRAPHS = ("The circle is blue.", "What is there? A red circle, and beside it nothing at all.", "No.", "Is it so?")


def build(lm: Any, *, looking: bool = False) -> MultimodalLM:
    config = CrossAttentionConfig(every_k_layers=1) if looking else MlpConfig()
    return MultimodalLM(lm, build_connector(config, 8, LmShape(64, 2))).eval()


def tuned(lm: Any) -> MultimodalLM:
    """With an adapter that does something."""
    model = build(add_adapter(lm, LoraConfig(rank=4)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model


def test_the_set_is_whole_and_each_question_accepts_its_own_answers_alone() -> None:
    questions, prose = text_set().questions, text_set().prose
    assert len(questions) == len({q.question for q in questions}) == 50
    assert len(prose) == len(set(prose)) == 30
    assert all(80 <= len(paragraph.split()) <= 120 for paragraph in prose)
    for question in questions:
        assert all(accepts(question, f"I think it is {answer.upper()}!") for answer in question.answers)
        assert not accepts(question, question.question), "saying the question again answers nothing"
        assert not accepts(question, "I am a helpful assistant, and I do not know what to say to that.")


def test_an_answer_counts_as_whole_words_wherever_it_stands() -> None:
    question = TextQuestion(question="How much?", answers=("5", "twenty five"))
    assert accepts(question, "It is 5.")
    assert accepts(question, "That makes twenty-five, I believe")
    assert not accepts(question, "It is 15 or 50.")


@pytest.mark.parametrize("looking", [False, True])
def test_loss_is_the_lms_own_over_all_tokens_but_each_first(tiny_lm: TinyLM, tokenizer: Any, looking: bool) -> None:
    lm = tiny_lm("llama")
    total, n_tokens = 0.0, 0
    for paragraph in PARAGRAPHS:
        ids = tokenizer(paragraph, add_special_tokens=False, return_tensors="pt").input_ids  # (1, t)
        logits = lm(input_ids=ids).logits[0, :-1]  # (t - 1, vocab)
        total += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
        n_tokens += ids.shape[1] - 1
    found = loss_per_token(build(lm, looking=looking), tokenizer, PARAGRAPHS, batch_size=3)
    assert found == pytest.approx(total / n_tokens, rel=1e-5)


def test_replies_are_the_lms_own_in_order(tiny_lm: TinyLM, tokenizer: Any) -> None:
    lm = tiny_lm("phi3")
    questions = ["What is there?", "Is there a circle, or is there none?", "What?"]
    replies = list(text_replies(build(lm), tokenizer, questions, batch_size=2))
    for question, reply in zip(questions, replies, strict=True):
        turn = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        stops = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>", "<|eot_id|>"])]
        out = lm.generate(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=stops, pad_token_id=0)
        assert reply == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.lengthy
def test_without_its_adapter_a_model_measures_as_the_untuned_lm(tiny_lm: TinyLM, tokenizer: Any) -> None:
    untuned = measure(build(tiny_lm("llama")), tokenizer)
    model = tuned(tiny_lm("llama"))
    with_adapter = measure(model, tokenizer)
    with adapter_disabled(model):
        assert measure(model, tokenizer) == untuned
    assert measure(model, tokenizer) == with_adapter
    assert with_adapter.loss_per_token != untuned.loss_per_token


def test_measuring_leaves_a_model_as_it_was(tiny_lm: TinyLM, tokenizer: Any) -> None:
    model = tuned(tiny_lm("llama"))
    trained = model.trainable_names()
    model.train()
    with adapter_disabled(model):
        measure(model, tokenizer)
    assert model.training
    assert model.trainable_names() == trained
    model.eval().requires_grad_(False)
    with adapter_disabled(model):
        pass
    assert model.trainable_names() == set()
    assert not model.training


def test_the_change_of_loss_is_relative_to_the_untuned_lm() -> None:
    untuned = TextAbility(27, 50, 4.0)
    assert TextAbility(20, 50, 4.2).loss_change(untuned) == pytest.approx(0.05)
    assert untuned.score.right == 27


@pytest.mark.lengthy
def test_a_bundle_is_compared_with_the_lm_that_it_refers_to(make_bundle: Any) -> None:  # noqa: F811
    bundle = make_bundle("llama", template="chatml")
    found, untuned = compare(bundle)
    assert found == measure(bundle.load_model(), bundle.tokenizer)
    lm = load_language_model(bundle.profile.language, bundle.weights(bundle.profile.language.source))
    assert untuned == measure(build(lm), bundle.tokenizer)
    assert found.loss_per_token != untuned.loss_per_token


@pytest.mark.lengthy
def test_a_merged_bundle_is_compared_with_the_lm_of_its_recipes_profile(make_bundle: Any, tmp_path: Path) -> None:  # noqa: F811
    bundle = make_bundle("llama", template="chatml")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(bundle.profile.model_dump(mode="json")))
    told = dataclasses.replace(
        bundle, info=bundle.info.model_copy(update={"recipe": bundle.info.recipe | {"profile": str(path)}})
    )
    found, untuned = compare(merge_bundle(told, "merged"))
    before, after = compare(bundle)
    assert untuned == after
    assert found.loss_per_token == pytest.approx(before.loss_per_token, rel=1e-4)
    with pytest.raises(BundleError, match="no recipe"):
        compare(merge_bundle(bundle, "of-unknown-origin"))


def test_where_the_connector_alone_was_trained_text_is_as_before(make_bundle: Any) -> None:  # noqa: F811
    found, untuned = compare(make_bundle("llama", template="chatml", adapter=False))
    assert found == untuned
