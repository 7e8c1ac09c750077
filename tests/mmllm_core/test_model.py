"""MultimodalLM: images stand where they were put, and the loss is the LM's own."""

from typing import Any

import pytest
import torch
from torch import nn

from mmllm_core.config import CrossAttentionConfig, MlpConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from mmllm_core.errors import ConfigError
from mmllm_core.model import MultimodalLM
from tests.conftest import TinyLM

FAMILIES = ["llama", "phi3", "phi", "qwen2", "gpt2", "gpt_neox"]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_lm: TinyLM) -> MultimodalLM:
    return MultimodalLM(tiny_lm(request.param), build_connector(MlpConfig(), 32, LmShape(64, 2))).eval()


def test_features_replace_image_positions_in_order(model: MultimodalLM) -> None:
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 7], [IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 8, 9]])
    features = torch.randn(2, 2, 32)
    embeddings = model.embed(ids, features)
    projected = model.connector(features)
    words = model.causal_lm.get_input_embeddings()
    assert torch.equal(embeddings[0, 1:3], projected[0])
    assert torch.equal(embeddings[1, :2], projected[1])
    assert torch.equal(embeddings[0, 3], words(torch.tensor(7)))


@pytest.mark.parametrize("n_images", [0, 1, 3])
def test_too_few_or_too_many_features_are_an_error(n_images: int, tiny_lm: TinyLM) -> None:
    model = MultimodalLM(tiny_lm("llama"), build_connector(MlpConfig(), 32, LmShape(64, 2)))
    ids = torch.tensor([[5, *[IMAGE_TOKEN_ID] * 4, 7]])
    features = torch.randn(n_images, 2, 32) if n_images else None
    with pytest.raises(ValueError, match="image positions"):
        model.embed(ids, features)


def test_loss_equals_cross_entropy_over_full_logits(model: MultimodalLM) -> None:
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, 7, 8, 9], [4, 5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7, 8, IGNORE_INDEX], [IGNORE_INDEX, 5, 6, *[IGNORE_INDEX] * 2]])
    features = torch.randn(1, 1, 32)
    loss = model(ids, mask, labels, features)
    logits = model.lm(inputs_embeds=model.embed(ids, features), attention_mask=mask).logits
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    assert torch.allclose(loss, expected, atol=1e-4)


def test_an_lm_that_changes_logits_after_its_head_is_refused(tiny_lm: TinyLM) -> None:
    with pytest.raises(ConfigError, match="logits_scaling"):
        MultimodalLM(tiny_lm("granite", logits_scaling=8.0), build_connector(MlpConfig(), 32, LmShape(64, 2)))


def test_an_lm_without_layers_by_that_name_cannot_be_looked_into(tiny_lm: TinyLM) -> None:
    connector = build_connector(CrossAttentionConfig(every_k_layers=1), 32, LmShape(64, 2))
    with pytest.raises(ConfigError, match="GPT2Model has no 'layers'"):
        MultimodalLM(tiny_lm("gpt2"), connector)


def test_gradients_reach_the_connector_through_a_frozen_lm(model: MultimodalLM) -> None:
    model.lm.requires_grad_(False)
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, 7]])
    model(ids, torch.ones_like(ids), torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7]]), torch.randn(1, 1, 32)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.connector.parameters())
    assert model.trainable_names() == {f"connector.{name}" for name, _ in model.connector.named_parameters()}


def test_padding_on_the_left_does_not_change_greedy_answers(model: MultimodalLM) -> None:
    short, long = [5, 6], [5, 7, 8, 9, 10]
    alone = model.generate(
        torch.tensor([short]), torch.ones(1, 2, dtype=torch.int64), None, max_new_tokens=6, stop_ids=[0]
    )
    ids = torch.tensor([[0, 0, 0, *short], long])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    together = model.generate(ids, mask, None, max_new_tokens=6, stop_ids=[0])
    found: Any = together[0, : alone.shape[1]]
    assert found.tolist() == alone[0].tolist()
