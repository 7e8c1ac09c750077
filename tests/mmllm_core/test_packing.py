"""Packing and grouping: conversations in one row do not see each other, and none is lost or given twice."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm_core.config import BatchingConfig, ConnectorConfig, CrossAttentionConfig, MlpConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID, Rendered
from mmllm_core.data.batching import Encoded, micro_batches, pack
from mmllm_core.data.collate import collate, collate_packed
from mmllm_core.model import MultimodalLM
from tests.conftest import TinyLM


def conversation(n_tokens: int, n_images: int, rng: random.Random, *, image_tokens: int = 1) -> Encoded:
    """Random ids, images first, the last half supervised."""
    ids = [IMAGE_TOKEN_ID] * n_images * image_tokens + [rng.randrange(1, 300) for _ in range(n_tokens)]
    labels = [IGNORE_INDEX] * len(ids)
    for i in range(len(ids) // 2, len(ids)):
        labels[i] = ids[i]
    features = tuple(
        np.float16(np.random.default_rng(rng.randrange(999)).normal(size=(1, 32))) for _ in range(n_images)
    )
    return Encoded(Rendered(ids, labels, n_images), features)


def random_feature(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, 32)).astype(np.float16)


def flat(conversations: list[Encoded]) -> list[np.ndarray]:
    return [image for c in conversations for image in c.images]


@pytest.fixture(params=[MlpConfig(), CrossAttentionConfig(every_k_layers=1, head_dim=16)], ids=lambda c: c.kind)
def connector_config(request: pytest.FixtureRequest) -> ConnectorConfig:
    return request.param


@pytest.fixture(params=["llama", "phi3", "phi"])
def model(request: pytest.FixtureRequest, tiny_lm: TinyLM, connector_config: ConnectorConfig) -> MultimodalLM:
    torch.manual_seed(3)
    model = MultimodalLM(tiny_lm(request.param), build_connector(connector_config, 32, LmShape(64, 2))).eval()
    for name, parameter in model.connector.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_loss_equals_the_loss_of_conversations_apart(model: MultimodalLM, attention: str) -> None:
    model.causal_lm.set_attn_implementation(attention)
    rng = random.Random(0)
    each = [conversation(n, k, rng) for n, k in ((6, 1), (4, 0), (9, 2), (3, 1), (1, 0))]
    packed = collate_packed([[c.rendered for c in each[:3]], [c.rendered for c in each[3:]]], flat(each))
    apart = collate([c.rendered for c in each], flat(each))

    with torch.inference_mode():
        found = model(packed.input_ids, packed.attention_mask, packed.labels, packed.features, packed.position_ids)
        expected = model(apart.input_ids, apart.attention_mask, apart.labels, apart.features)
    assert packed.n_supervised == apart.n_supervised
    assert torch.allclose(found, expected, rtol=1e-5)


def test_no_conversation_sees_another_in_its_row(model: MultimodalLM) -> None:
    rng = random.Random(1)
    each = [conversation(6, 1, rng), conversation(5, 1, rng), conversation(7, 0, rng)]
    position_ids, hidden = hidden_states(model, each)
    borders = [0, 7, 13, 20]
    for changed in range(3):
        others = [conversation(c.n_tokens - len(c.images), len(c.images), rng) for c in each]
        perturbed = [*each[:changed], others[changed], *each[changed + 1 :]]
        moved = (hidden_states(model, perturbed)[1] - hidden).abs().amax(-1)[0]  # (t,)
        for number in range(3):
            span = moved[borders[number] : borders[number + 1]]
            assert (span > 1e-5).any() if number == changed else (span == 0).all()
    assert position_ids[0].tolist() == [*range(7), *range(6), *range(7)]


@torch.inference_mode()
def hidden_states(model: MultimodalLM, row: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and the LM's last hidden states of one packed row."""
    batch = collate_packed([[c.rendered for c in row]], flat(row))
    assert batch.position_ids is not None
    model._show(model.media(batch.input_ids, batch.features, batch.position_ids))
    inputs = model.embed(batch.input_ids, batch.features)
    hidden = model.causal_lm.model(inputs_embeds=inputs, position_ids=batch.position_ids, use_cache=False)
    return batch.position_ids, hidden.last_hidden_state


def test_a_first_token_is_not_predicted_from_the_conversation_before() -> None:
    supervised_from_the_start = Rendered([5, 6], [5, 6], 0)
    batch = collate_packed([[supervised_from_the_start] * 2], [])
    assert batch.labels.tolist() == [[IGNORE_INDEX, 6, IGNORE_INDEX, 6]]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=80), capacity=st.integers(50, 90))
def test_packing_places_each_item_once_and_overfills_no_row(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // min(capacity, 50)) + 1


def test_an_item_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="raise pack_tokens"):
        pack([3, 11], 10)


def stream(n: int) -> Iterator[Encoded]:
    rng = random.Random(4)
    for i in range(n):
        made = conversation(rng.randrange(2, 40), rng.choice([0, 0, 1, 2]), rng)
        yield Encoded(made.rendered, made.images, f"sample {i}")


@pytest.mark.parametrize("grouping", ["none", "length"])
@pytest.mark.parametrize("pack_tokens", [None, 64])
def test_every_conversation_lands_in_exactly_one_batch(grouping: str, pack_tokens: int | None) -> None:
    config = BatchingConfig(grouping=grouping, pack_tokens=pack_tokens)  # type: ignore[arg-type]
    whole = list(stream(103))
    made = micro_batches(whole, config, 4)
    assert sum(int(batch.attention_mask.sum()) for batch in made) == sum(c.n_tokens for c in whole)
    assert sum(0 if batch.features is None else len(batch.features) for batch in made) == len(flat(whole))
    assert max(len(batch.input_ids) for batch in made) <= 4
    expected = sorted(int(t) for c in whole for t in c.rendered.input_ids)
    assert sorted(int(t) for b in made for t in b.input_ids[b.attention_mask.bool()]) == expected
    assert sorted(id for batch in made for id in batch.ids) == sorted(c.id for c in whole)


def test_like_lengths_share_a_batch() -> None:
    def padding(config: BatchingConfig) -> int:
        return sum(int((b.attention_mask == 0).sum()) for b in micro_batches(list(stream(128)), config, 4))

    plain = padding(BatchingConfig())
    assert padding(BatchingConfig(grouping="length")) < plain / 2
    assert padding(BatchingConfig(pack_tokens=256)) < plain / 2


def test_a_step_without_conversations_has_no_batches() -> None:
    assert micro_batches([], BatchingConfig(), 4) == []
    assert micro_batches([], BatchingConfig(pack_tokens=64), 4) == []
