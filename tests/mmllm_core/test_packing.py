"""Packing and grouping: conversations in one line do not see each other, and none is lost or given twice."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmllm_core.config import BatchingConfig, ConnectorConfig, CrossAttentionConfig, MlpConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID, Rendered
from mmllm_core.data.batching import Encoded, micro_batches, pack
from mmllm_core.data.collate import Batch, collate, collate_packed
from mmllm_core.errors import ConfigError
from mmllm_core.model import MultimodalLM
from mmllm_core.packed_attention import PACKABLE, Packing
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


SYSTEM = list(range(301, 311))
"""Tokens that conversations begin with."""


def begun(conversation: Encoded) -> Encoded:
    """The same after a system message."""
    rendered = conversation.rendered
    labels = [IGNORE_INDEX] * (len(SYSTEM) + 1) + rendered.labels[1:]
    return Encoded(Rendered(SYSTEM + rendered.input_ids, labels, rendered.n_images), conversation.images)


@pytest.mark.parametrize("shared", [False, True])
def test_packed_loss_and_gradients_equal_those_of_conversations_apart(model: MultimodalLM, shared: bool) -> None:
    rng = random.Random(0)
    each = [conversation(n, k, rng) for n, k in ((6, 1), (4, 0), (30, 2), (3, 1), (5, 0))]
    if shared:
        each = [begun(c) for c in each]
    packed = collate_packed([c.rendered for c in each], flat(each))
    apart = collate([c.rendered for c in each], flat(each))
    n_tokens = sum(c.n_tokens for c in each)
    assert packed.input_ids.shape == (1, n_tokens - shared * 4 * len(SYSTEM))
    assert packed.packing is not None
    assert len(packed.packing.groups) > 1, "lengths are unlike, so that groups are tested too"
    assert packed.n_supervised == apart.n_supervised

    found, gradients = loss_and_gradients(model, packed)
    expected, expected_gradients = loss_and_gradients(model, apart)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], rtol=1e-3, atol=2e-5), name


def loss_and_gradients(model: MultimodalLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(batch.input_ids, batch.attention_mask, batch.labels, batch.features, batch.packing)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_checkpointed_gradients_of_packed_conversations_are_the_same(model: MultimodalLM) -> None:
    rng = random.Random(2)
    each = [begun(conversation(n, 1, rng)) for n in (6, 4, 9)]
    batch = collate_packed([c.rendered for c in each], flat(each))
    model.train()
    _, expected = loss_and_gradients(model, batch)
    model.checkpoint_gradients()
    _, found = loss_and_gradients(model, batch)
    assert all(torch.allclose(found[name], gradient, atol=1e-6) for name, gradient in expected.items())


@pytest.mark.parametrize("model_type", sorted(PACKABLE))
@pytest.mark.parametrize("window", [512, 4])
def test_every_packable_lm_attends_as_to_conversations_apart(tiny_lm: TinyLM, model_type: str, window: int) -> None:
    """The window shorter than the conversations, and in all layers where the LM lets one choose."""
    torch.manual_seed(3)
    windowed = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    model = MultimodalLM(tiny_lm(model_type, **windowed), build_connector(MlpConfig(), 32, LmShape(64, 2))).eval()
    rng = random.Random(0)
    each = [begun(conversation(n, 0, rng)) for n in (12, 9, 30)]
    packed, apart = collate_packed([c.rendered for c in each], []), collate([c.rendered for c in each], [])
    with torch.inference_mode():
        found = model(packed.input_ids, packed.attention_mask, packed.labels, None, packed.packing)
        expected = model(apart.input_ids, apart.attention_mask, apart.labels, None)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_attention_is_plain_again_where_conversations_are_not_packed(model: MultimodalLM) -> None:
    rng = random.Random(5)
    each = [conversation(6, 1, rng), conversation(4, 1, rng)]
    packed, apart = (make([c.rendered for c in each], flat(each)) for make in (collate_packed, collate))
    first, _ = loss_and_gradients(model, apart)
    loss_and_gradients(model, packed)
    again, _ = loss_and_gradients(model, apart)
    assert torch.equal(first, again)


def test_a_batch_is_trained_on_after_it_was_evaluated(model: MultimodalLM) -> None:
    rng = random.Random(6)
    each = [begun(conversation(n, 1, rng)) for n in (6, 4)]
    batch = collate_packed([c.rendered for c in each], flat(each))
    with torch.inference_mode():
        evaluated = model(batch.input_ids, batch.attention_mask, batch.labels, batch.features, batch.packing)
    trained, _ = loss_and_gradients(model, batch)
    assert torch.equal(trained, evaluated)


@pytest.mark.parametrize("model_type", ["bloom", "lfm2", "doge"])
def test_an_lm_with_an_attention_of_its_own_is_refused(tiny_lm: TinyLM, model_type: str) -> None:
    model = MultimodalLM(tiny_lm(model_type), build_connector(MlpConfig(), 32, LmShape(64, 2)))
    batch = collate_packed([Rendered([5, 6, 7], [IGNORE_INDEX, 6, 7], 0)], [])
    with pytest.raises(ConfigError, match=model_type):
        model(batch.input_ids, batch.attention_mask, batch.labels, None, batch.packing)


def test_no_conversation_sees_another_in_its_line(model: MultimodalLM) -> None:
    rng = random.Random(1)
    each = [conversation(6, 1, rng), conversation(5, 1, rng), conversation(7, 0, rng)]
    batch, hidden = hidden_states(model, each)
    borders = [0, 7, 13, 20]
    for changed in range(3):
        others = [conversation(c.n_tokens - len(c.images), len(c.images), rng) for c in each]
        perturbed = [*each[:changed], others[changed], *each[changed + 1 :]]
        moved = (hidden_states(model, perturbed)[1] - hidden).abs().amax(-1)[0]  # (t,)
        for number in range(3):
            span = moved[borders[number] : borders[number + 1]]
            assert (span > 1e-5).any() if number == changed else (span == 0).all()
    assert batch.packing is not None
    assert batch.packing.position_ids[0].tolist() == [*range(7), *range(6), *range(7)]


@torch.inference_mode()
def hidden_states(model: MultimodalLM, conversations: list[Encoded]) -> tuple[Batch, Tensor]:
    """Packed conversations, and the LM's last hidden states."""
    batch = collate_packed([c.rendered for c in conversations], flat(conversations))
    seen: list[Tensor] = []
    hook = model.causal_lm.base_model.register_forward_hook(lambda *out: seen.append(out[-1].last_hidden_state))
    model(batch.input_ids, batch.attention_mask, batch.labels, batch.features, batch.packing)
    hook.remove()
    return batch, seen[0]


def test_a_first_token_is_not_predicted_from_the_conversation_before() -> None:
    supervised_from_the_start = Rendered([5, 6], [5, 6], 0)
    batch = collate_packed([supervised_from_the_start] * 2, [])
    assert batch.labels.tolist() == [[IGNORE_INDEX, 6, IGNORE_INDEX, 6]]


@pytest.mark.parametrize(
    ("conversations", "n_shared"),
    [
        ([[*SYSTEM, 1, 2], [*SYSTEM, 3, 4]], 10),
        ([[*SYSTEM, 1, 2]], 0),
        ([[*SYSTEM, 1, 2], [*SYSTEM[:4], 3, 4]], 0),
        ([[*SYSTEM, 1, 2], [*SYSTEM, 1, 2]], 10),
        ([SYSTEM, SYSTEM], 8),
        ([[*SYSTEM[:9], IMAGE_TOKEN_ID, 5, 7], [*SYSTEM[:9], IMAGE_TOKEN_ID, 5, 6]], 9),
    ],
)
def test_what_conversations_begin_with_stands_once(conversations: list[list[int]], n_shared: int) -> None:
    """Up to the token before the first supervised one, here the last of each, and to the first image."""
    rows = [
        Rendered(ids, [IGNORE_INDEX] * (len(ids) - 1) + ids[-1:], ids.count(IMAGE_TOKEN_ID)) for ids in conversations
    ]
    batch = collate_packed(rows, [random_feature(0) for row in rows for _ in range(row.n_images)])
    assert batch.packing is not None
    assert batch.packing.n_shared == n_shared
    assert batch.n_supervised == len(rows)
    assert batch.input_ids[0].tolist() == conversations[0] + [i for ids in conversations[1:] for i in ids[n_shared:]]


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
    assert sum(batch.input_ids.numel() for batch in made) == sum(c.n_tokens for c in whole), "nothing is padded"
    assert all(batch.attention_mask.all() for batch in made)
    assert sum(0 if batch.features is None else len(batch.features) for batch in made) == len(flat(whole))
    assert max(len(batch.ids) if pack_tokens is None else batch.input_ids.numel() / 64 for batch in made) <= 4
    expected = sorted(int(t) for c in whole for t in c.rendered.input_ids)
    assert sorted(int(t) for b in made for t in b.input_ids.flatten()) == expected
    assert sorted(id for batch in made for id in batch.ids) == sorted(c.id for c in whole)


def test_like_lengths_share_a_batch() -> None:
    def spread(config: BatchingConfig) -> int:
        length = {c.id: c.n_tokens for c in stream(128)}
        batches = [[length[id] for id in batch.ids] for batch in micro_batches(list(stream(128)), config, 4)]
        return sum(max(lengths) - min(lengths) for lengths in batches)

    assert spread(BatchingConfig(grouping="length")) < spread(BatchingConfig()) / 2


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), n_shared=st.integers(0, 9))
def test_groups_hold_each_position_once_and_waste_at_most_half(lengths: list[int], n_shared: int) -> None:
    packing = Packing.of(lengths, n_shared)
    rows = torch.cat([group.flatten() for group in packing.groups])
    assert rows[packing.order].tolist() == list(range(n_shared, n_shared + sum(lengths)))
    assert len(rows) <= 2 * sum(lengths)
    starts = packing.starts[0]
    counted = torch.arange(len(starts)) - starts + torch.where(torch.arange(len(starts)) < n_shared, 0, n_shared)
    assert packing.position_ids[0].tolist() == counted.tolist()


def test_a_step_without_conversations_has_no_batches() -> None:
    assert micro_batches([], BatchingConfig(), 4) == []
    assert micro_batches([], BatchingConfig(pack_tokens=64), 4) == []
