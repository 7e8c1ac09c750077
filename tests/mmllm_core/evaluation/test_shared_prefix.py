"""Decoding that computes once what prompts have in common gives the tokens of decoding that does not."""

from typing import Any

import numpy as np
import pytest
import torch

from mmllm_core.config import CrossAttentionConfig, MlpConfig, ResamplerConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IMAGE_TOKEN_ID, Rendered
from mmllm_core.data.collate import collate, collate_packed
from mmllm_core.evaluation.shared_prefix import Prompt, generate_about_images
from mmllm_core.model import MultimodalLM
from tests.conftest import VOCABULARY, TinyLM

CONNECTORS = {
    "mlp": MlpConfig(),
    "resampler": ResamplerConfig(n_queries=3),
    "cross_attention": CrossAttentionConfig(every_k_layers=1, n_queries=3),
}
N_NEW = 6
N_IMAGES = 5


def seeing(lm: Any, kind: str) -> MultimodalLM:
    """A model whose answers depend on the image."""
    torch.manual_seed(3)
    model = MultimodalLM(lm, build_connector(CONNECTORS[kind], 8, LmShape(64, 2))).eval()
    with torch.no_grad():
        for name, parameter in model.connector.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(1.0)
    return model


def images() -> list[Any]:
    return list(np.random.default_rng(0).normal(size=(N_IMAGES, 5, 8)).astype(np.float16))


def prompts(n_image_tokens: int, lead: list[int]) -> list[Prompt]:
    """Of tails of many lengths, several about one image and in no order; two are equal."""
    rng = np.random.default_rng(1)
    made = []
    for number in (3, 0, 3, 1, 4, 0, 0, 3, 1, 2, 0, 3):
        tail = rng.integers(20, VOCABULARY, rng.integers(1, 8)).tolist()
        made.append(Prompt([*lead, *[IMAGE_TOKEN_ID] * n_image_tokens, *tail], number))
    return [*made, made[4]]


def one_by_one(model: MultimodalLM, asked: list[Prompt], stop_ids: list[int]) -> list[list[int]]:
    """What `MultimodalLM.generate` answers to each prompt by itself, up to what ends it."""
    answers = []
    for prompt in asked:
        batch = collate([Rendered(list(prompt.input_ids), list(prompt.input_ids), 1)], [images()[prompt.image]])
        ids = model.generate(
            batch.input_ids, batch.attention_mask, batch.features, max_new_tokens=N_NEW, stop_ids=stop_ids
        )[0].tolist()
        answers.append(ids[: next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))])
    return answers


def test_a_model_in_training_answers_too(tiny_lm: TinyLM) -> None:
    model = seeing(tiny_lm("llama"), "mlp")
    asked = prompts(model.connector.n_tokens(5), lead=[1, 30, 31, 32])
    expected = generate_about_images(model, asked, images(), max_new_tokens=N_NEW, stop_ids=[0])
    batch = collate_packed([Rendered([5, 6, 7], [5, 6, 7], 0)] * 2, [])
    model(batch.input_ids, batch.attention_mask, batch.labels, None, batch.packing).backward()
    assert generate_about_images(model, asked, images(), max_new_tokens=N_NEW, stop_ids=[0]) == expected


@pytest.mark.parametrize("max_positions", [1, 40, 90, 4096])
@pytest.mark.parametrize("kind", sorted(CONNECTORS))
@pytest.mark.parametrize("lm", ["llama", "phi", "phi3"])
@pytest.mark.lengthy
def test_tokens_are_those_of_generating_one_by_one(lm: str, kind: str, max_positions: int, tiny_lm: TinyLM) -> None:
    model = seeing(tiny_lm(lm), kind)
    asked = prompts(model.connector.n_tokens(5), lead=[1, 30, 31, 32])
    free = one_by_one(model, asked, [0])
    # Tokens that some answers have early, late or never: rows leave the batch at different steps.
    stop_ids = sorted({0, free[0][0], free[1][3], free[3][2]})
    expected = one_by_one(model, asked, stop_ids)
    assert len({len(ids) for ids in expected}) > 2
    found = generate_about_images(
        model, asked, images(), max_new_tokens=N_NEW, stop_ids=stop_ids, max_positions=max_positions
    )
    assert found == expected
    shuffled = [Prompt(prompt.input_ids, (prompt.image + 1) % N_IMAGES) for prompt in asked]
    assert one_by_one(model, shuffled, stop_ids) != expected, "the images matter to this model"


@pytest.mark.lengthy
def test_an_image_may_come_first_of_all(tiny_lm: TinyLM) -> None:
    model = seeing(tiny_lm("llama"), "mlp")
    asked = prompts(model.connector.n_tokens(5), lead=[])
    found = generate_about_images(model, asked, images(), max_new_tokens=N_NEW, stop_ids=[0])
    assert found == one_by_one(model, asked, [0])


def test_prompts_that_begin_otherwise_are_refused(tiny_lm: TinyLM) -> None:
    model = seeing(tiny_lm("llama"), "mlp")
    asked = [*prompts(5, lead=[1, 30]), *prompts(5, lead=[1, 31])]
    with pytest.raises(ValueError, match="before their image"):
        generate_about_images(model, asked, images(), max_new_tokens=1, stop_ids=[0])
    assert generate_about_images(model, [], [], max_new_tokens=1, stop_ids=[0]) == []


def test_the_lm_reads_what_is_shared_once(tiny_lm: TinyLM) -> None:
    model = seeing(tiny_lm("llama"), "mlp")
    asked = prompts(5, lead=[1, 30, 31, 32])
    read: list[tuple[int, int]] = []
    model.causal_lm.base_model.layers[0].register_forward_pre_hook(
        lambda _layer, args: read.append(tuple(args[0].shape[:2]))
    )
    generate_about_images(model, asked, images(), max_new_tokens=1, stop_ids=[0])
    longest = max(len(prompt.input_ids) for prompt in asked) - 9
    assert read == [(1, 4), (N_IMAGES, 5), (len(asked), longest)]
