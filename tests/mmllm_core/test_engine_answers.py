"""What every engine promises of its answers (`mmllm_core.engine.protocol.Engine`), tried on each that is installed."""

from typing import Any

import pytest
import torch

from mmllm_core.config import MlpConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IMAGE_TOKEN_ID
from mmllm_core.engine.protocol import EngineRequest, SamplingParams
from mmllm_core.language import load_tokenizer
from mmllm_core.model import MultimodalLM
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from tests.conftest import TinyLM
from tests.mmllm_core.engine_subject import (
    ENGINES,
    WIDER,
    Start,
    Subject,
    complete,
    of_tokens,
    reference,
    text_of,
    together,
    tokens,
)

PROMPTS = [[5 + i, 20, *range(30, 33 + 7 * (i % 4))] for i in range(8)]


def test_greedy_answers_equal_generate(subject: Subject) -> None:
    found = complete(subject, [5, 20, 30], max_tokens=24)
    assert tokens(found) == reference(subject.plain, [5, 20, 30], 24)
    assert text_of(found) == subject.tokenizer.decode(tokens(found))
    last = found[-1]
    assert (last.prompt_tokens, last.completion_tokens, last.finish_reason) == (3, 24, "length")
    assert sum(chunk.finish_reason is not None for chunk in found) == 1


def test_requests_that_run_together_do_not_change_each_other(subject: Subject) -> None:
    requests = [of_tokens(str(i), p, max_tokens=8 + 3 * i) for i, p in enumerate(PROMPTS)]
    for i, found in enumerate(together(subject, *requests)):
        assert tokens(found) == reference(subject.plain, PROMPTS[i], 8 + 3 * i), i


def test_a_long_prompt_is_computed_in_pieces(subject: Subject) -> None:
    prompt = [20 + i * i % 300 for i in range(480)]  # a step has 256 positions
    found, beside = together(
        subject, of_tokens("long", prompt, max_tokens=16), of_tokens("b", PROMPTS[3], max_tokens=16)
    )
    assert tokens(found) == reference(subject.plain, prompt, 16)
    assert tokens(beside) == reference(subject.plain, PROMPTS[3], 16)


def test_embeddings_are_answered_as_their_tokens(subject: Subject) -> None:
    with torch.no_grad():
        embeddings = subject.plain.get_input_embeddings()(torch.tensor(PROMPTS[3]))
    mixed = EngineRequest("a", embeddings, SamplingParams(max_tokens=16)), of_tokens("b", PROMPTS[3], max_tokens=16)
    of_embeddings, of_ids = together(subject, *mixed)
    assert tokens(of_embeddings) == tokens(of_ids) == reference(subject.plain, PROMPTS[3], 16)


def test_images_in_prompts_are_answered_as_by_the_model(subject: Subject) -> None:
    lm = subject.plain
    torch.manual_seed(1)
    model = MultimodalLM(lm, build_connector(MlpConfig(kind="mlp"), 12, LmShape.of(lm.config))).eval()
    shown = torch.randn(3, 4, 12)
    prompts = [
        ([20, *[IMAGE_TOKEN_ID] * 4, 30, 31], shown[:1]),
        ([21, 22, 23], None),
        ([*[IMAGE_TOKEN_ID] * 4, 40, *[IMAGE_TOKEN_ID] * 4, 41], shown[1:]),
    ]
    with torch.inference_mode():
        requests = [
            EngineRequest(str(i), model.embed(torch.tensor([ids]), features)[0], SamplingParams(max_tokens=12))
            for i, (ids, features) in enumerate(prompts)
        ]
    for found, (ids, features) in zip(together(subject, *requests), prompts, strict=True):
        mask = torch.ones(1, len(ids))
        expected = model.generate(torch.tensor([ids]), mask, features, max_new_tokens=12, stop_ids=[-1])
        assert tokens(found) == expected[0].tolist()


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("family", ["phi", "phi3"])
def test_families(kind: str, family: str, start_subject: Start, tiny_lm: TinyLM, tokenizer: Any) -> None:
    subject = start_subject(kind, tiny_lm(family, **WIDER), tokenizer)
    requests = [of_tokens(str(i), p, max_tokens=16) for i, p in enumerate(PROMPTS[:4])]
    for i, found in enumerate(together(subject, *requests)):
        assert tokens(found) == reference(subject.plain, PROMPTS[i], 16), i


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = resolve(load_profile("embedded").language.source)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_tokenizer(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_a_real_lm(kind: str, start_subject: Start, smollm2: tuple[Any, Any]) -> None:
    lm, tokenizer = smollm2
    subject = start_subject(kind, lm, tokenizer)
    asked = ["What is the capital of France?", "Name three colours.", "Tell me about rivers, and say why they bend."]
    prompts = []
    for question in asked:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer(rendered, add_special_tokens=False).input_ids)
    requests = [of_tokens(str(i), p, max_tokens=32) for i, p in enumerate(prompts)]
    for i, found in enumerate(together(subject, *requests)):
        assert tokens(found) == reference(lm, prompts[i], 32), asked[i]
    assert "Paris" in text_of(together(subject, requests[0])[0])


def test_a_seed_gives_the_same_sample_in_any_company(subject: Subject) -> None:
    sampling = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.95}
    alone = tokens(complete(subject, [5, 6], seed=7, **sampling))
    others = [of_tokens(str(i), [9 + i, 9], seed=i, **sampling) for i in range(3)]
    assert tokens(together(subject, *others, of_tokens("b", [5, 6], seed=7, **sampling))[-1]) == alone
    assert tokens(complete(subject, [5, 6], seed=8, **sampling)) != alone


def test_what_leaves_one_choice_is_greedy(subject: Subject) -> None:
    greedy = tokens(complete(subject, [5, 6], max_tokens=8))
    for choice in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert tokens(complete(subject, [5, 6], max_tokens=8, temperature=1.5, seed=1, **choice)) == greedy, choice


@pytest.mark.parametrize(
    ("repetition", "presence", "frequency"), [(1.0, 2.0, 0.0), (1.0, 0.0, 1.5), (1.4, 0.0, 0.0), (1.2, -0.5, 0.7)]
)
def test_penalties_are_for_what_the_answer_holds(
    repetition: float, presence: float, frequency: float, subject: Subject
) -> None:
    with torch.inference_mode():
        prompt = subject.plain.get_input_embeddings()(torch.tensor([5, 6]))
        expected: list[int] = []
        for _ in range(24):
            ids = torch.tensor([[5, 6, *expected]])
            logits = subject.plain(ids).logits[0, -1]
            for token in set(expected):
                value = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
                logits[token] = value - presence - frequency * expected.count(token)
            expected.append(int(logits.argmax()))
    penalties = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    request = EngineRequest("a", prompt, SamplingParams(max_tokens=24, **penalties))
    assert tokens(together(subject, request)[0]) == expected
    assert expected != tokens(complete(subject, [5, 6], max_tokens=24))


def test_a_repetition_penalty_is_for_prompt_and_answer_whatever_ran_before(subject: Subject) -> None:
    prompt = [20 + i for i in range(40)]
    image = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        text = subject.plain.get_input_embeddings()(torch.tensor(prompt))  # (t, d_model)
    shown = torch.cat([text[:20], image, text[20:]])
    content = (*prompt[:20], -1, -2, -3, -4, *prompt[20:])
    complete(subject, [5, 6], max_tokens=100, temperature=1.0, seed=4)  # leaves tokens where the next prompt lies
    sampling = SamplingParams(max_tokens=24, repetition_penalty=1.6)
    for request, embeddings in (
        (EngineRequest("ids", token_ids=tuple(prompt), sampling=sampling), text),
        (EngineRequest("image", shown, sampling, content=content), shown),
    ):
        assert tokens(together(subject, request)[0]) == penalised(subject.plain, embeddings, prompt, 24, 1.6), (
            request.id
        )


def penalised(lm: Any, embeddings: torch.Tensor, prompt: list[int], n: int, penalty: float) -> list[int]:
    """Greedy tokens, with a repetition penalty on what prompt and answer hold."""
    chosen: list[int] = []
    with torch.inference_mode():
        for _ in range(n):
            answer = lm.get_input_embeddings()(torch.tensor(chosen, dtype=torch.int64))
            logits = lm(inputs_embeds=torch.cat([embeddings, answer]).unsqueeze(0)).logits[0, -1]
            for token in {*prompt, *chosen}:
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            chosen.append(int(logits.argmax()))
    return chosen


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(subject: Subject) -> None:
    whole = tokens(complete(subject, [5, 20, 30], max_tokens=24))
    subject.ending_with(whole[3])
    found = complete(subject, [5, 20, 30], max_tokens=24)
    assert tokens(found) == whole[: whole.index(whole[3])]
    assert found[-1].finish_reason == "stop"
    assert found[-1].completion_tokens == len(tokens(found))


def test_min_tokens_hold_a_stop_token_back(subject: Subject) -> None:
    whole = tokens(complete(subject, [5, 20, 30], max_tokens=24))
    subject.ending_with(whole[3])
    found = tokens(complete(subject, [5, 20, 30], max_tokens=24, min_tokens=10))
    assert len(found) >= 10
    assert whole[3] not in found[:10]


def test_a_stop_string_is_cut_off_and_never_shown(subject: Subject) -> None:
    whole = text_of(complete(subject, [5, 20, 30], max_tokens=24))
    stop = whole[4:9]  # across tokens
    found = complete(subject, [5, 20, 30], max_tokens=24, stop=(stop,))
    assert text_of(found) == whole[: whole.index(stop)]
    assert found[-1].finish_reason == "stop"


def test_characters_are_never_split(subject: Subject) -> None:
    found = complete(subject, [5, 6], max_tokens=200, temperature=2.0, seed=3)
    whole = subject.tokenizer.decode(tokens(found))
    assert text_of(found) == whole
    assert any(ord(character) > 127 for character in whole)
    assert not any(chunk.text.endswith("\ufffd") for chunk in found[:-1])


def test_logprobs_are_the_lms_own(subject: Subject) -> None:
    found = complete(subject, [5, 20, 30], max_tokens=6, logprobs=3, temperature=0.7, seed=2)
    chosen, told = tokens(found), [logprob for chunk in found for logprob in chunk.logprobs]
    assert [logprob.token_id for logprob in told] == chosen
    with torch.no_grad():
        logits = subject.plain(torch.tensor([[5, 20, 30, *chosen]])).logits[0, 2:-1]  # (n, vocab)
    expected = logits.log_softmax(-1)
    for i, logprob in enumerate(told):
        assert logprob.logprob == pytest.approx(float(expected[i, chosen[i]]), abs=1e-3)
        values, ids = expected[i].topk(3)
        assert [token for token, _ in logprob.top] == ids.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(values.tolist(), abs=1e-3)


def test_several_answers_to_one_prompt(subject: Subject) -> None:
    sampling = {"n": 3, "max_tokens": 12, "temperature": 1.0, "seed": 5}
    found = complete(subject, [5, 20, 30], **sampling)
    answers = [tokens(found, index) for index in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3
    assert {chunk.index for chunk in found if chunk.finish_reason == "length"} == {0, 1, 2}
    again = complete(subject, [5, 20, 30], **sampling)
    assert [tokens(again, index) for index in range(3)] == answers
