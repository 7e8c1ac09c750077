"""The engine keeps its promises on tiny models of the real classes."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from mmllm_core.engine.protocol import EngineChunk, EngineRequest, SamplingParams
from mmllm_core.engine.text_stream import TextStream
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.errors import ConversationError, EngineError
from tests.conftest import TinyLM

MakeEngine = Callable[..., TransformersEngine]
PLAIN: "WeakKeyDictionary[TransformersEngine, Any]" = WeakKeyDictionary()
"""The same LM as each engine's, for the engine's own attends to pages alone."""


@pytest.fixture
def make_engine(tiny_lm: TinyLM, tokenizer: Any) -> Iterator[MakeEngine]:
    engines = []

    def make(model_type: str = "llama", context_length: int = 256, **settings: Any) -> TransformersEngine:
        lm = tiny_lm(model_type)
        engine = TransformersEngine(lm, tokenizer, context_length=context_length, **settings)
        engines.append(engine)
        PLAIN[engine] = tiny_lm(model_type)
        return engine

    yield make
    for engine in engines:
        engine.shutdown()


def prompt(engine: TransformersEngine, ids: list[int]) -> torch.Tensor:
    return engine._lm.get_input_embeddings()(torch.tensor(ids)).detach()  # (t, d_model)


async def complete(engine: TransformersEngine, id: str, ids: list[int], **sampling: Any) -> list[EngineChunk]:
    request = EngineRequest(id, prompt(engine, ids), SamplingParams(**sampling))
    return [chunk async for chunk in engine.generate(request)]


def tokens(chunks: list[EngineChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def reference(engine: TransformersEngine, ids: list[int], n: int) -> list[int]:
    """What `model.generate` says, without the token that ended it."""
    output = (
        PLAIN[engine]
        .generate(
            inputs_embeds=prompt(engine, ids).unsqueeze(0),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=engine._stop_ids or -1,
            pad_token_id=0,
        )[0]
        .tolist()
    )
    return output[:-1] if output[-1] in engine._stop_ids else output


@pytest.mark.parametrize("model_type", ["llama", "phi3", "phi"])
def test_greedy_output_equals_generate(model_type: str, make_engine: MakeEngine) -> None:
    engine = make_engine(model_type)
    engine._stop_ids = []
    chunks = asyncio.run(complete(engine, "a", [5, 20, 30], max_tokens=24))
    assert tokens(chunks) == reference(engine, [5, 20, 30], 24)
    assert len(tokens(chunks)) == 24
    assert chunks[-1].prompt_tokens == 3
    assert chunks[-1].completion_tokens == len(tokens(chunks))


def test_concurrent_requests_do_not_change_each_other(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompts = [[5 + i, 20, 30 + 3 * i] for i in range(8)]

    async def all_at_once() -> list[list[EngineChunk]]:
        return await asyncio.gather(*(complete(engine, str(i), p, max_tokens=16) for i, p in enumerate(prompts)))

    assert [tokens(chunks) for chunks in asyncio.run(all_at_once())] == [reference(engine, p, 16) for p in prompts]


def test_a_seed_gives_the_same_sample_whatever_else_runs(make_engine: MakeEngine) -> None:
    engine = make_engine()
    sampling = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.9}

    async def beside_another() -> list[EngineChunk]:
        _, found = await asyncio.gather(
            complete(engine, "other", [9, 9], seed=1, **sampling), complete(engine, "b", [5, 6], seed=7, **sampling)
        )
        return found

    alone = asyncio.run(complete(engine, "a", [5, 6], seed=7, **sampling))
    assert tokens(asyncio.run(beside_another())) == tokens(alone)
    assert tokens(asyncio.run(complete(engine, "c", [5, 6], seed=8, **sampling))) != tokens(alone)


def test_max_tokens_ends_with_length(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine._stop_ids = []
    found = asyncio.run(complete(engine, "a", [5, 6], max_tokens=3))
    assert found[-1].finish_reason == "length"
    assert found[-1].completion_tokens == len(tokens(found)) == 3


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine._stop_ids = []
    whole = tokens(asyncio.run(complete(engine, "a", [5, 20, 30], max_tokens=24)))
    engine._stop_ids = [whole[3]]
    found = asyncio.run(complete(engine, "b", [5, 20, 30], max_tokens=24))
    assert tokens(found) == whole[: whole.index(whole[3])]
    assert found[-1].finish_reason == "stop"


def test_a_stop_string_is_cut_off_and_ends_the_answer(make_engine: MakeEngine) -> None:
    engine = make_engine()
    whole = "".join(c.text for c in asyncio.run(complete(engine, "a", [5, 20, 30], max_tokens=24)))
    stop = whole[4:7]
    chunks = asyncio.run(complete(engine, "b", [5, 20, 30], max_tokens=24, stop=(stop,)))
    assert "".join(c.text for c in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"


def test_a_prompt_that_does_not_fit_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(context_length=16)
    with pytest.raises(ConversationError, match="16"):
        asyncio.run(complete(engine, "a", [5] * 16))
    chunks = asyncio.run(complete(engine, "b", [5, 6], max_tokens=100))
    assert chunks[-1].completion_tokens <= 14


def test_abort_and_closing_free_the_engine(make_engine: MakeEngine) -> None:
    engine = make_engine(context_length=100_000)
    engine._stop_ids = []

    async def start_then_leave() -> str | None:
        sampling = SamplingParams(max_tokens=100_000, temperature=2.0, seed=0)
        endless = EngineRequest("a", prompt(engine, [5, 6]), sampling)
        stream = engine.generate(endless)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        aborted = engine.generate(EngineRequest("b", endless.embeddings, endless.sampling))
        await anext(aborted)
        engine.abort("b")
        return [chunk async for chunk in aborted][-1].finish_reason

    assert asyncio.run(asyncio.wait_for(start_then_leave(), 60)) == "abort"
    assert engine.load().running == engine.load().waiting == 0


def test_a_request_that_fails_leaves_the_others_alone(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def one_bad() -> list[Any]:
        bad = EngineRequest("bad", torch.zeros(3, 7), SamplingParams())  # of another width than the model's

        async def ask_badly() -> list[EngineChunk]:
            return [chunk async for chunk in engine.generate(bad)]

        return await asyncio.gather(ask_badly(), complete(engine, "good", [5, 6], max_tokens=8), return_exceptions=True)

    failed, good = asyncio.run(one_bad())
    assert isinstance(failed, EngineError)
    assert tokens(good) == reference(engine, [5, 6], 8)
    engine.health()


def test_an_engine_that_was_shut_down_is_not_healthy(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.shutdown()
    with pytest.raises(EngineError, match="down"):
        engine.health()


def stream_of(tokenizer: Any, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("text", ["What colour?", "naïve 🌍 çà va", "日本語 text", "  spaces  kept "])
def test_streamed_text_is_the_whole_text_in_whole_characters(text: str, tokenizer: Any) -> None:
    pieces = stream_of(tokenizer, text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_stop_string_across_tokens_never_leaks(tokenizer: Any) -> None:
    assert "".join(stream_of(tokenizer, "one two END three", ("END",))) == "one two "


def test_what_only_looked_like_a_stop_string_is_given_back(tokenizer: Any) -> None:
    assert "".join(stream_of(tokenizer, "one EN", ("END",))) == "one EN"


def test_a_stop_string_that_ends_in_an_unfinished_character_never_leaks(tokenizer: Any) -> None:
    class Fixed:
        def decode(self, ids: list[int]) -> str:
            return b"".join({0: b"a EN", 1: b"D\xe6"}[i] for i in ids).decode(errors="replace")

    stream = TextStream(Fixed(), ("END",))  # type: ignore[arg-type]
    assert stream.push(0) + stream.push(1) + stream.flush() == "a "


@pytest.mark.parametrize("text", ["Hello , world .  It 's", "naïve 🌍 日本"])
def test_sentencepiece_text_is_streamed_whole(text: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"Helo,wrdIts'.nav"]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = stream_of(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_shutting_down_ends_requests_that_run(make_engine: MakeEngine) -> None:
    engine = make_engine(context_length=100_000)
    engine._stop_ids = []

    async def shut_down_midway() -> str | None:
        sampling = SamplingParams(max_tokens=100_000, temperature=2.0)
        stream = engine.generate(EngineRequest("a", prompt(engine, [5, 6]), sampling))
        await anext(stream)
        await asyncio.to_thread(engine.shutdown)
        return [chunk async for chunk in stream][-1].finish_reason

    assert asyncio.run(asyncio.wait_for(shut_down_midway(), 60)) == "abort"


def test_requests_of_one_id_do_not_harm_the_engine(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def twice() -> list[list[EngineChunk]]:
        return await asyncio.gather(*(complete(engine, "same", [5, 6 + i], max_tokens=4 + 4 * (1 - i)) for i in (0, 1)))

    first, second = asyncio.run(asyncio.wait_for(twice(), 60))
    assert tokens(first) == reference(engine, [5, 6], 8)
    assert tokens(second) == reference(engine, [5, 7], 4)
    engine.health()
    assert engine.load().running == engine.load().waiting == 0
