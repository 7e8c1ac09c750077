"""Requests that are computed together come out as if each were alone."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mmllm_core.config import CrossAttentionConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IMAGE_TOKEN_ID
from mmllm_core.engine.protocol import EngineChunk, EngineRequest, SamplingParams
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.errors import ConfigError, ConversationError, DeadlineError, EngineError
from mmllm_core.model import MultimodalLM
from tests.conftest import TinyLM, long_rope
from tests.mmllm_core.engine_subject import ask, of_tokens, reference, tokens

MakeEngine = Callable[..., TransformersEngine]


@pytest.fixture
def make_engine(tokenizer: Any) -> Iterator[MakeEngine]:
    engines = []

    def make(lm: Any, context_length: int = 256, **settings: Any) -> TransformersEngine:
        engine = TransformersEngine(lm, tokenizer, context_length=context_length, **settings)
        engine._stop_ids = []
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.shutdown()


@pytest.mark.lengthy
@pytest.mark.parametrize("model_type", ["llama", "phi3", "phi", "gpt2", "gemma2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_mix_equals_generate(model_type: str, seed: int, tiny_lm: TinyLM, make_engine: MakeEngine) -> None:
    rng = random.Random(seed)
    changes = {"head_dim": 16, "sliding_window": 24} if model_type == "gemma2" else {}
    engine = make_engine(tiny_lm(model_type, **changes), step_tokens=rng.choice([8, 33]), kv_cache_bytes=300_000)
    shared = [rng.randrange(12, 300) for _ in range(40)]
    prompts = [
        shared[: rng.choice([0, 0, 20, 40])] + [rng.randrange(12, 300) for _ in range(rng.randrange(1, 60))]
        for _ in range(32)
    ]
    lengths = [rng.randrange(1, 40) for _ in prompts]
    leaves = {i: rng.randrange(1, 6) for i in range(32) if rng.random() < 0.25}

    async def come_and_go(i: int) -> list[int] | None:
        await asyncio.sleep(rng.random() * 0.3)
        found: list[EngineChunk] = []
        stream = engine.generate(of_tokens(str(i), prompts[i], max_tokens=lengths[i]))
        async for chunk in stream:
            found.append(chunk)
            if i in leaves and len(found) >= leaves[i]:
                await stream.aclose()  # type: ignore[attr-defined]
                return None
        return tokens(found)

    async def all_of_them() -> list[list[int] | None]:
        return await asyncio.gather(*map(come_and_go, range(32)))

    found = asyncio.run(asyncio.wait_for(all_of_them(), 120))
    plain = tiny_lm(model_type, **changes)
    for i, answer in enumerate(found):
        if answer is not None:
            assert answer == reference(plain, prompts[i], lengths[i]), i
    assert sum(answer is not None for answer in found) >= 16
    wait_until_idle(engine)


def wait_until_idle(engine: TransformersEngine) -> None:
    deadline = time.monotonic() + 20
    while (load := engine.load()) and (load.running or load.waiting or load.kv_use) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (load.running, load.waiting, load.tokens_in_flight, load.kv_use) == (0, 0, 0, 0)


def test_a_seed_gives_the_same_in_any_company(tiny_lm: TinyLM, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_lm("llama"))
    sampling = {"max_tokens": 20, "temperature": 1.0, "top_p": 0.95}

    async def in_company() -> list[list[EngineChunk]]:
        requests = [of_tokens(str(i), [20 + i, 30], seed=i, **sampling) for i in range(12)]
        return await asyncio.gather(*(ask(engine, request) for request in requests))

    together = asyncio.run(in_company())
    for i in (0, 5, 11):
        alone = asyncio.run(ask(engine, of_tokens("alone", [20 + i, 30], seed=i, **sampling)))
        assert tokens(alone) == tokens(together[i])


def test_what_prompts_share_is_computed_once(tiny_lm: TinyLM, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_lm("llama"))
    system = list(range(20, 60))
    first = asyncio.run(ask(engine, of_tokens("a", [*system, 7], max_tokens=30)))
    assert first[-1].cached_tokens == 0
    turn = [*system, 7, *tokens(first), 9]  # the conversation goes on
    second = asyncio.run(ask(engine, of_tokens("b", turn, max_tokens=8)))
    assert second[-1].cached_tokens == 64  # pages of 16 in 70 positions and one more
    assert tokens(second) == reference(tiny_lm("llama"), turn, 8)
    again = asyncio.run(ask(engine, of_tokens("c", system[:32], max_tokens=8)))
    assert again[-1].cached_tokens == 16  # a position is left to be computed
    assert tokens(again) == reference(tiny_lm("llama"), system[:32], 8)


def test_embeddings_are_shared_by_content_alone(tiny_lm: TinyLM, make_engine: MakeEngine) -> None:
    lm = tiny_lm("llama")
    engine, embed = make_engine(lm), lm.get_input_embeddings()
    with torch.no_grad():
        text = embed(torch.arange(20, 60))
        images = torch.randn(2, 40, text.shape[1], generator=torch.Generator().manual_seed(0))

    def of(image: int | None, content: tuple[int, ...] | None) -> EngineRequest:
        embeddings = text if image is None else torch.cat([text[:4], images[image][:36]])
        return EngineRequest(str(image), embeddings, SamplingParams(max_tokens=6), content=content)

    keys = [(*range(20, 24), *range(-100 - 1000 * i, -64 - 1000 * i)) for i in (0, 1)]
    one = asyncio.run(ask(engine, of(0, keys[0])))
    other = asyncio.run(ask(engine, of(1, keys[1])))
    assert other[-1].cached_tokens == 0
    again = asyncio.run(ask(engine, of(0, keys[0])))
    assert again[-1].cached_tokens == 32
    assert tokens(again) == tokens(one)
    assert asyncio.run(ask(engine, of(0, None)))[-1].cached_tokens == 0


def test_several_answers_to_one_prompt(tiny_lm: TinyLM, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_lm("llama"))
    request = of_tokens("a", list(range(20, 56)), n=3, max_tokens=12, temperature=1.0, seed=5)
    found = asyncio.run(ask(engine, request))
    answers = [tokens(found, index) for index in range(3)]
    assert all(len(answer) == 12 for answer in answers)
    assert len({tuple(answer) for answer in answers}) == 3
    last = {chunk.index: chunk for chunk in found if chunk.finish_reason}
    assert {index: chunk.cached_tokens for index, chunk in last.items()} == {0: 0, 1: 32, 2: 32}
    again = asyncio.run(ask(engine, request))
    assert [tokens(again, index) for index in range(3)] == answers


def test_who_finds_no_room_waits(tiny_lm: TinyLM, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_lm("llama"), kv_cache_bytes=4 * 16 * 512)  # four pages
    assert engine._pool.n_pages == 4

    async def five() -> list[list[EngineChunk]]:
        return await asyncio.gather(*(ask(engine, of_tokens(str(i), [20 + i], max_tokens=40)) for i in range(5)))

    for i, found in enumerate(asyncio.run(five())):
        assert tokens(found) == reference(tiny_lm("llama"), [20 + i], 40)
    with pytest.raises(ConversationError, match="the memory for keys and values holds 64"):
        asyncio.run(ask(engine, of_tokens("long", list(range(20, 84)), max_tokens=1)))
    assert len(tokens(asyncio.run(ask(engine, of_tokens("cut", [20] * 60, max_tokens=40))))) == 4


def test_a_deadline_ends_its_request_alone(tiny_lm: TinyLM, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_lm("llama"), context_length=100_000)

    async def both() -> list[Any]:
        late = of_tokens("late", [20], time.monotonic() + 0.2, max_tokens=90_000)
        return await asyncio.gather(
            ask(engine, late), ask(engine, of_tokens("b", [21], max_tokens=8)), return_exceptions=True
        )

    late, other = asyncio.run(asyncio.wait_for(both(), 60))
    assert isinstance(late, DeadlineError)
    assert len(tokens(other)) == 8
    wait_until_idle(engine)


def test_a_step_that_fails_is_tried_again_without_harm(
    tiny_lm: TinyLM, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("gpt2")  # whose sequences are computed one by one, each into a cache of its own
    engine = make_engine(lm)
    forward, broken = lm.forward, torch.full((1, 64), 9.0)

    def fail(*, inputs_embeds: torch.Tensor, **others: Any) -> Any:
        if torch.equal(inputs_embeds[0, :1], broken):
            raise RuntimeError("out of order")
        return forward(inputs_embeds=inputs_embeds, **others)

    monkeypatch.setattr(lm, "forward", fail)

    async def both() -> list[Any]:
        good = [ask(engine, of_tokens(f"good {i}", [21 + i], max_tokens=20)) for i in range(2)]
        bad = EngineRequest("bad", broken.repeat(3, 1), SamplingParams(max_tokens=4))
        return await asyncio.gather(good[0], ask(engine, bad), good[1], return_exceptions=True)

    first, bad, second = asyncio.run(both())
    assert isinstance(bad, EngineError)
    assert "out of order" in str(bad)
    for i, found in enumerate((first, second)):
        assert tokens(found) == reference(tiny_lm("gpt2"), [21 + i], 20)
    assert not engine._step._computed  # type: ignore[attr-defined]


def test_steps_take_the_threads_that_the_engine_was_given(
    tiny_lm: TinyLM, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, of_this_thread, seen = tiny_lm("gpt2"), torch.get_num_threads(), set()
    forward = lm.forward

    def count(**inputs: Any) -> Any:
        seen.add(torch.get_num_threads())
        return forward(**inputs)

    monkeypatch.setattr(lm, "forward", count)
    asyncio.run(ask(make_engine(lm, n_threads=3), of_tokens("a", [20], max_tokens=3)))
    assert seen == {3}
    assert torch.get_num_threads() == of_this_thread


def test_a_dead_thread_fails_health_and_all_requests(
    tiny_lm: TinyLM, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_lm("llama"), context_length=100_000)

    async def die() -> list[Any]:
        asking = [asyncio.ensure_future(ask(engine, of_tokens(str(i), [20], max_tokens=90_000))) for i in range(2)]
        await asyncio.sleep(0.2)
        monkeypatch.setattr(engine, "_drop", lambda sent: 1 / 0)
        return await asyncio.gather(*asking, return_exceptions=True)

    failed = asyncio.run(asyncio.wait_for(die(), 60))
    assert all(isinstance(error, EngineError) and "died" in str(error) for error in failed)
    with pytest.raises(EngineError, match="down"):
        engine.health()


def test_each_sequence_looks_at_its_own_images(tiny_lm: TinyLM, make_engine: MakeEngine) -> None:
    def build() -> MultimodalLM:
        lm = tiny_lm("llama")
        config = CrossAttentionConfig(kind="cross_attention", n_queries=2, depth=1, head_dim=8, every_k_layers=1)
        torch.manual_seed(1)
        model = MultimodalLM(lm, build_connector(config, 12, LmShape.of(lm.config))).eval()
        with torch.no_grad():
            for name, parameter in model.connector.named_parameters():
                if "gate" in name or name == "marker":
                    parameter.fill_(0.9)
        return model

    plain, model = build(), build()
    engine = make_engine(model.lm, showing=model.showing, step_tokens=7)
    shown = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(2))
    prompts = [
        ([20, IMAGE_TOKEN_ID, 30, 31], shown[:1]),
        ([21, 22, 23, 24, 25, 26, 27, 28, 29], None),
        ([20, IMAGE_TOKEN_ID, 30, IMAGE_TOKEN_ID, 31, 32, 33, 34, 35, 36], shown[1:3]),
        ([IMAGE_TOKEN_ID, 30], shown[3:]),
    ]

    async def together() -> list[list[EngineChunk]]:
        requests = []
        with torch.inference_mode():
            for i, (ids, features) in enumerate(prompts):
                input_ids = torch.tensor([ids])
                embeddings = model.embed(input_ids, features)[0]
                media = model.media(input_ids, features)
                requests.append(EngineRequest(str(i), embeddings, SamplingParams(max_tokens=8 + i), media))
        return await asyncio.gather(*(ask(engine, request) for request in requests))

    found = asyncio.run(together())
    for i, (ids, features) in enumerate(prompts):
        expected = plain.generate(
            torch.tensor([ids]), torch.ones(1, len(ids)), features, max_new_tokens=8 + i, stop_ids=[-1]
        )
        assert tokens(found[i]) == expected[0].tolist(), i


def test_long_and_short_sequences_tell_positions_in_their_own_way(tiny_lm: TinyLM, make_engine: MakeEngine) -> None:
    changes = long_rope(8)
    engine = make_engine(tiny_lm("phi3", **changes), step_tokens=16)
    prompts = [[20 + i for i in range(10)], [20 + 3 * i for i in range(70)]]

    async def both() -> list[list[EngineChunk]]:
        return await asyncio.gather(*(ask(engine, of_tokens(str(p[1]), p, max_tokens=12)) for p in prompts))

    for found, ids in zip(asyncio.run(both()), prompts, strict=True):
        assert tokens(found) == reference(tiny_lm("phi3", **changes), ids, 12)


def test_lms_that_cannot_be_batched_are_refused(tiny_lm: TinyLM, make_engine: MakeEngine) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(ConfigError, match="dynamic"):
        make_engine(tiny_lm("llama", rope_parameters=rope, max_position_embeddings=128), context_length=256)
