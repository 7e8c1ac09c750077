"""Both steps give the logits of the LM's own forward pass, however a line is laid out."""

import random
from typing import Any

import pytest
import torch

from mmllm_core.engine.lean_step import LeanStep, is_lean
from mmllm_core.engine.packed_linear import is_packable, pack
from mmllm_core.engine.paged_attention import PAGE, KvCache, StepLayout
from mmllm_core.engine.step import PlainStep, kv_shape
from tests.conftest import TinyLM, long_rope

LMS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 24, "tie_word_embeddings": True}),
    ("phi3", {"sliding_window": 11}),
    ("phi3", long_rope(6, partial_rotary_factor=0.75)),
]


@pytest.mark.parametrize("step_class", [PlainStep, LeanStep])
@pytest.mark.parametrize(("model_type", "changes"), LMS)
def test_logits_are_those_of_the_lm(
    step_class: type[PlainStep] | type[LeanStep], model_type: str, changes: dict[str, Any], tiny_lm: TinyLM
) -> None:
    plain, lm = tiny_lm(model_type, **changes), tiny_lm(model_type, **changes)
    assert is_lean(lm)
    embed = lm.get_input_embeddings()
    cache = KvCache(*kv_shape(lm.config), 40, torch.float32)
    step = step_class(lm, cache, 256)
    rng = random.Random(0)
    sequences = [[rng.randrange(12, 300) for _ in range(n)] for n in (5, 16, 17, 40, 90)]
    free = rng.sample(range(40), 40)
    pages = [[free.pop() for _ in range(-(-len(ids) // PAGE))] for ids in sequences]
    with torch.inference_mode():
        expected = [plain(torch.tensor([ids])).logits[0] for ids in sequences]
        done = [0] * len(sequences)
        ropes = [step.rope_of(len(ids)) for ids in sequences]
        while any(n < len(ids) for n, ids in zip(done, sequences, strict=True)):
            todo = [i for i, ids in enumerate(sequences) if done[i] < len(ids)]
            decoding = [i for i in todo if done[i] and rng.random() < 0.5]
            chunks = {i: rng.randint(1, len(sequences[i]) - done[i]) for i in todo if i not in decoding}
            layout = StepLayout.of(
                [(pages[i], done[i]) for i in decoding], [(pages[i], done[i], n, True) for i, n in chunks.items()]
            )
            line = [sequences[i][done[i] : done[i] + n] for i, n in [*((i, 1) for i in decoding), *chunks.items()]]
            order = [*decoding, *chunks]
            found = step(
                embed(torch.tensor([token for part in line for token in part])), layout, [ropes[i] for i in order]
            )
            for row, i in enumerate(order):
                done[i] += chunks.get(i, 1)
                torch.testing.assert_close(found[row], expected[i][done[i] - 1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("step_class", [PlainStep, LeanStep])
@pytest.mark.parametrize(("model_type", "changes"), LMS)
def test_a_step_holds_no_weight_twice(
    step_class: type[PlainStep] | type[LeanStep], model_type: str, changes: dict[str, Any], tiny_lm: TinyLM
) -> None:
    lm = tiny_lm(model_type, **changes)
    linears = [module.weight for module in lm.modules() if type(module) is torch.nn.Linear]
    embedding = lm.get_input_embeddings().weight
    assert len(linears) > 7
    if not is_packable(embedding):
        pytest.skip("this CPU does not pack weights")
    n_embeddings = embedding.numel()
    step_class(lm, KvCache(*kv_shape(lm.config), 1, torch.float32), 16)
    assert embedding.numel() == n_embeddings
    assert all(weight is embedding or weight.numel() == 0 for weight in linears)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_packed_products_are_those_of_the_layer(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 80, dtype=dtype)
    x, other = torch.randn(1, rows, 48, dtype=dtype), torch.randn(1, rows, 80, dtype=dtype)
    with torch.inference_mode():
        product = layer(x).float()
        packed = pack(layer)
        if dtype == torch.float32:
            assert packed.is_packed
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 2**-6}
        for found, expected in (
            (packed(x), product),
            (packed.silu(x), torch.nn.functional.silu(product)),
            (packed.times(x, other), product * other),
            (packed.plus(x, other), product + other),
        ):
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), expected.float(), **close)


def test_what_a_lean_step_cannot_be_derived_from(tiny_lm: TinyLM) -> None:
    assert not is_lean(tiny_lm("phi"))
    assert not is_lean(tiny_lm("llama", attention_bias=True))
    hooked = tiny_lm("llama")
    hooked.base_model.layers[1].register_forward_pre_hook(lambda module, args: None)
    assert not is_lean(hooked)
