"""Conversations in which an untuned LM answers prompts itself."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmllm_core.config import LanguageConfig, PathSource
from mmllm_core.data.json_rows import read_rows
from mmllm_core.data.text import chat_record
from mmllm_core.errors import DataError
from mmllm_core.evaluation.text_ability import text_prompts
from mmllm_core.models.profile import load_profile
from tests.conftest import TinyLM
from train_jobs.own_answers import loops, main, own_answers, read_prompts, whole_sentences

PROMPTS = ["What is there?", "Is there a circle, or is there none?", "What?"]
ENDS = list(range(0, 400, 8))
"""So many tokens end an answer that a random LM soon comes upon one."""


def test_prompts_are_the_lines_that_are_not_comments(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# a heading\n\n  What is there?\nTurn # 5 into words.\n", encoding="utf-8")
    assert read_prompts(path) == ["What is there?", "Turn # 5 into words."]
    path.write_text("# a heading alone\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(path)
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("It is blue. It is round! And it", "It is blue. It is round!"),
        ('He said "no." Then he', 'He said "no."'),
        ("Take these:\n1. Salt.\n2. Pepper.\n3.", "Take these:\n1. Salt.\n2. Pepper."),
        ("Pi is 3.14 and a b", ""),
        ("It is blue.", "It is blue."),
        ("", ""),
    ],
)
def test_what_breaks_off_is_cut_back_to_its_last_whole_sentence(text: str, whole: str) -> None:
    assert whole_sentences(text) == whole


def test_a_text_that_says_the_same_again_and_again_loops() -> None:
    said = "The yen is the official currency of Japan."
    assert not loops(said)
    assert not loops("Yes.")
    assert loops(f"{said} {said}")
    assert not loops(f"{said} It was introduced in the reign of an emperor who had seen the coins of other countries.")


def test_answers_are_the_lms_own_in_order(tiny_lm: TinyLM, tokenizer: Any) -> None:
    lm = tiny_lm("llama")
    lm.generation_config.eos_token_id = ENDS
    stops = [*ENDS, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>", "<|eot_id|>"])]
    expected = []
    for prompt in PROMPTS:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids  # (1, t)
        out = lm.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=stops, pad_token_id=0)
        assert out[0, -1] in stops, "this answer would be cut back to whole sentences"
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    answers = own_answers(lm, tokenizer, PROMPTS, max_new_tokens=40)
    assert answers == expected
    assert all(answers)


def test_an_answer_that_loops_is_given_again_under_a_penalty(
    tiny_lm: TinyLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    lm.generation_config.eos_token_id = ENDS
    greedy = own_answers(lm, tokenizer, PROMPTS, max_new_tokens=40)
    monkeypatch.setattr("train_jobs.own_answers.loops", lambda text: text == greedy[1])
    answers = own_answers(lm, tokenizer, PROMPTS, max_new_tokens=40)
    assert (answers[0], answers[2]) == (greedy[0], greedy[2])
    rendered = next(text_prompts(tokenizer, PROMPTS[1:2]))
    out = lm.generate(
        inputs_embeds=lm.get_input_embeddings()(rendered.input_ids),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=1.1,
        eos_token_id=[*ENDS, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>", "<|eot_id|>"])],
        pad_token_id=0,
    )  # (1, n_new)
    penalised = tokenizer.decode(out[0], skip_special_tokens=True).strip()
    assert answers[1] == penalised != greedy[1]


def test_an_answer_that_neither_ends_nor_holds_a_sentence_is_none(tiny_lm: TinyLM, tokenizer: Any) -> None:
    assert own_answers(tiny_lm("llama"), tokenizer, PROMPTS, max_new_tokens=3) == [None, None, None]


def test_a_profiles_lm_answers_a_file_of_prompts(tiny_lm: TinyLM, tokenizer: Any, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    lm.generation_config.eos_token_id = ENDS
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    language = LanguageConfig(source=PathSource(path=tmp_path / "lm"), quantization="none", dtype="float32")
    profile = load_profile("embedded").model_copy(update={"language": language})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(profile.model_dump(mode="json")), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("# three\n" + "\n".join(PROMPTS), encoding="utf-8")
    main(tmp_path / "prompts.txt", tmp_path / "out.jsonl", profile=str(tmp_path / "tiny.yaml"), max_new_tokens=40)
    records = [chat_record(row.value) for row in read_rows(tmp_path / "out.jsonl")]
    assert [record.id for record in records] == ["own-1", "own-2", "own-3"]
    assert [record.turns[0].text for record in records] == PROMPTS
    answers = [record.turns[1].text for record in records]
    assert answers == own_answers(lm, tokenizer, PROMPTS, max_new_tokens=40)
