"""Gated cross-attention: equal to the text model at step 0, images where they were put, and text left alone."""

from typing import Any

import pytest
import torch

from mmllm_core.config import CrossAttentionConfig, LoraConfig
from mmllm_core.connectors import CrossAttentionConnector, LmShape, build_connector
from mmllm_core.connectors.cross_attention import last_image
from mmllm_core.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from mmllm_core.language import add_adapter
from mmllm_core.model import MultimodalLM
from tests.conftest import TinyLM

IMAGE = IMAGE_TOKEN_ID
CONFIG = CrossAttentionConfig(every_k_layers=1, n_queries=3, head_dim=16)
IDS = torch.tensor([[5, IMAGE, 7, 8, 9, IMAGE, 6, 4]])
LABELS = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7, 8, 9, IGNORE_INDEX, 6, 4]])


@pytest.fixture(params=["llama", "phi3", "phi"])
def model(request: pytest.FixtureRequest, tiny_lm: TinyLM) -> MultimodalLM:
    torch.manual_seed(1)
    connector = build_connector(CONFIG, 32, LmShape(64, 2))
    return MultimodalLM(tiny_lm(request.param), connector).eval()


def open_gates(model: MultimodalLM) -> None:
    for name, parameter in model.connector.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 0.7)


@torch.inference_mode()
def logits(model: MultimodalLM, ids: torch.Tensor, features: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
    """(b, t, vocab), with the images or without."""
    model._show(model.media(ids, features, None))
    return model.lm(inputs_embeds=model.embed(ids, features), **kwargs).logits


def test_step_0_equals_the_text_model_exactly(model: MultimodalLM, tiny_lm: TinyLM) -> None:
    seeing = logits(model, IDS, torch.randn(2, 5, 32))
    text_model = tiny_lm(model.causal_lm.config.model_type)
    with torch.inference_mode():
        marked = text_model.get_input_embeddings()(IDS.clamp(min=0)).masked_fill((IDS < 0).unsqueeze(-1), 0.0)
        expected = text_model(inputs_embeds=marked).logits
    assert torch.equal(seeing, expected)


def test_open_gates_see(model: MultimodalLM) -> None:
    first, second = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    open_gates(model)
    difference = (logits(model, IDS, first) - logits(model, IDS, second)).abs().amax(-1)[0]  # (t,)
    assert difference[0] == 0, "no image comes before the first position"
    assert (difference[1:] > 1e-4).all()


def test_a_position_looks_at_the_image_before_it_and_at_no_later_one(model: MultimodalLM) -> None:
    features = torch.randn(2, 5, 32)
    other = features.clone()
    other[1] = torch.randn(5, 32)
    open_gates(model)
    difference = (logits(model, IDS, features) - logits(model, IDS, other)).abs().amax(-1)[0]
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 1e-4).all()


def test_the_same_pictures_in_another_order_are_another_conversation(model: MultimodalLM) -> None:
    features = torch.randn(2, 5, 32)
    open_gates(model)
    assert not torch.allclose(logits(model, IDS, features), logits(model, IDS, features.flip(0)), atol=1e-3)


def test_text_alone_is_answered_as_by_the_text_model_whatever_was_trained(model: MultimodalLM, tiny_lm: TinyLM) -> None:
    open_gates(model)
    ids = torch.tensor([[5, 7, 8]])
    with torch.inference_mode():
        expected = tiny_lm(model.causal_lm.config.model_type)(input_ids=ids).logits
    assert torch.equal(logits(model, ids, None), expected)


@pytest.mark.lengthy
def test_in_a_batch_each_row_sees_its_own_images(model: MultimodalLM) -> None:
    open_gates(model)
    ids = torch.tensor([[5, IMAGE, 7, 8], [4, 5, 6, 9], [IMAGE, 5, IMAGE, 6]])
    features = torch.randn(3, 5, 32)
    together = logits(model, ids, features)
    alone = [logits(model, ids[i : i + 1], shown) for i, shown in enumerate((features[:1], None, features[1:]))]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_generation_goes_on_looking_at_the_last_image(model: MultimodalLM) -> None:
    open_gates(model)
    features = torch.randn(2, 5, 32)
    new = model.generate(IDS, torch.ones_like(IDS), features, max_new_tokens=6, stop_ids=[399])[0]
    assert model.connector._media is None, "nothing is looked at after the answer"  # type: ignore[attr-defined]
    ids = IDS
    for token in new:  # without a cache: every position looks again
        assert int(logits(model, ids, features)[0, -1].argmax()) == int(token)
        ids = torch.cat([ids, token.view(1, 1)], dim=1)


def test_gradients_open_the_gates_and_then_reach_everything(model: MultimodalLM) -> None:
    model.lm.requires_grad_(False)
    features, mask = torch.randn(2, 5, 32), torch.ones_like(IDS)
    model(IDS, mask, LABELS, features).backward()
    gates = {n: p for n, p in model.connector.named_parameters() if n.endswith("_gate")}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.values())
    open_gates(model)
    model.zero_grad()
    model(IDS, mask, LABELS, features).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.connector.parameters())


def test_it_works_beneath_an_adapter_and_with_gradient_checkpointing(tiny_lm: TinyLM) -> None:
    torch.manual_seed(1)
    model = MultimodalLM(add_adapter(tiny_lm("llama"), LoraConfig(rank=2)), build_connector(CONFIG, 32, LmShape(64, 2)))
    open_gates(model)
    model.train()
    features, mask = torch.randn(2, 5, 32), torch.ones_like(IDS)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(IDS, mask, LABELS, features).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == len(model.trainable_names())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_blocks_stand_before_every_kth_layer() -> None:
    connector = build_connector(CrossAttentionConfig(every_k_layers=4), 32, LmShape(64, 12))
    assert isinstance(connector, CrossAttentionConnector)
    assert list(connector.blocks) == ["3", "7", "11"]


def test_the_lms_weights_keep_their_names(model: MultimodalLM, tiny_lm: TinyLM) -> None:
    assert model.causal_lm.state_dict().keys() == tiny_lm(model.causal_lm.config.model_type).state_dict().keys()


@pytest.mark.parametrize(
    ("marks", "starts", "expected"),
    [
        ([[0, 1, 0, 1]], None, [[-1, 0, 0, 1]]),
        ([[1, 0], [0, 0], [0, 1]], None, [[0, 0], [-1, -1], [-1, 1]]),
        ([[1, 0, 0, 0, 1, 0]], [[0, 0, 2, 2, 2, 5]], [[0, 0, -1, -1, 1, -1]]),
        ([[0, 0, 1, 0, 0, 1]], [[0, 0, 2, 2, 4, 4]], [[-1, -1, 0, 0, -1, 1]]),
    ],
)
def test_each_position_is_given_the_last_image_of_its_own_conversation(
    marks: list[list[int]], starts: list[list[int]] | None, expected: list[list[int]]
) -> None:
    found = last_image(torch.tensor(marks, dtype=torch.bool), None if starts is None else torch.tensor(starts))
    assert found.tolist() == expected
