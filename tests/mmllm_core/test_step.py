"""Both steps give the logits of the LM's own forward pass, however a line is laid out."""

import random
from typing import Any

import pytest
import torch

from mmllm_core.engine.lean_step import LeanStep, is_lean
from mmllm_core.engine.paged_attention import PAGE, KvCache, StepLayout
from mmllm_core.engine.step import PlainStep
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
    attention, embed = lm.base_model.layers[0].self_attn, lm.get_input_embeddings()
    cache = KvCache(2, 40, lm.config.num_key_value_heads, attention.head_dim, torch.float32)
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


def test_a_lean_step_holds_no_weight_twice(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("llama")
    before = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    step = LeanStep(lm, KvCache(2, 1, 2, 16, torch.float32), 16)
    layer, attention = step._layers[0], lm.base_model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == layer.qkv.untyped_storage().data_ptr()
    assert len({p.untyped_storage().data_ptr() for p in lm.parameters()}) < len(before)


def test_what_a_lean_step_cannot_be_derived_from(tiny_lm: TinyLM) -> None:
    assert not is_lean(tiny_lm("phi"))
    assert not is_lean(tiny_lm("llama", attention_bias=True))
    hooked = tiny_lm("llama")
    hooked.base_model.layers[1].register_forward_pre_hook(lambda module, args: None)
    assert not is_lean(hooked)
