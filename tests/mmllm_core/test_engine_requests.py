"""What every engine promises of requests that are bound, refused, aborted or fail, tried on each that is installed."""

import asyncio
import json
import re
import threading
import time
from typing import Any

import pytest
import torch

from mmllm_core.engine.grammar import Grammars
from mmllm_core.engine.protocol import EngineRequest, SamplingParams
from mmllm_core.engine.vllm_engine import VllmEngine
from mmllm_core.errors import ConversationError, DeadlineError, EngineError, SchemaError
from tests.conftest import TinyLM
from tests.mmllm_core.engine_subject import (
    ENGINES,
    WIDER,
    Start,
    Subject,
    ask,
    complete,
    of_tokens,
    reference,
    text_of,
    together,
    tokens,
)


def test_what_an_engine_refuses_is_an_error(subject: Subject) -> None:
    if not isinstance(subject.engine, VllmEngine):
        pytest.skip("vLLM alone bounds penalties")
    with pytest.raises(EngineError, match="presence_penalty"):
        complete(subject, [5, 6], presence_penalty=100.0)


def test_answers_keep_to_a_schema(subject: Subject) -> None:
    colours = {"enum": ["red", "blue"]}
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": colours}, "required": ["a", "b"]}
    subject.ending_with(*subject.stop_ids)
    bound = of_tokens("a", [5, 6], json_schema=json.dumps(schema), max_tokens=100, temperature=1.0, seed=1)
    found, free = together(subject, bound, of_tokens("b", [5, 6], max_tokens=4))
    value = json.loads(text_of(found))
    assert list(value) == ["a", "b"]
    assert value["b"] in colours["enum"]
    assert found[-1].finish_reason == "stop"
    assert tokens(free)
    with pytest.raises(SchemaError, match="not a JSON schema"):
        complete(subject, [5, 6], json_schema='{"type": "shape"}')


def test_a_prompt_that_does_not_fit_is_refused(subject: Subject) -> None:
    with pytest.raises(ConversationError, match="512"):
        complete(subject, [5] * 512)
    found = complete(subject, [5] * 500, max_tokens=100)
    assert found[-1].completion_tokens == 12
    assert found[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (EngineRequest("width", torch.zeros(3, 7)), "7"),
        (EngineRequest("token", token_ids=(5, 4000)), "out of range|4000"),
    ],
    ids=lambda value: getattr(value, "id", ""),
)
def test_a_bad_request_fails_alone(bad: EngineRequest, reason: str, subject: Subject) -> None:
    failed, good = together(subject, bad, of_tokens("good", [5, 6], max_tokens=8))
    assert isinstance(failed, EngineError)
    assert re.search(reason, str(failed))
    assert tokens(good) == reference(subject.plain, [5, 6], 8)
    subject.engine.health()


def test_what_is_not_finite_fails_its_request_alone(subject: Subject) -> None:
    poisoned = EngineRequest("bad", torch.full((3, 128), float("nan")), SamplingParams(max_tokens=4))
    bad, good = together(subject, poisoned, of_tokens("good", [21], max_tokens=30))
    assert isinstance(bad, EngineError)
    assert "not finite" in str(bad)
    assert tokens(good) == reference(subject.plain, [21], 30)


def test_a_deadline_ends_its_request_alone(subject: Subject) -> None:
    late = of_tokens("late", [20], time.monotonic() + 0.05, max_tokens=500)
    failed, other = together(subject, late, of_tokens("b", [21], max_tokens=8))
    assert isinstance(failed, DeadlineError)
    assert tokens(other) == reference(subject.plain, [21], 8)


def test_who_leaves_or_is_aborted_frees_the_engine(subject: Subject) -> None:
    async def leave() -> list[str | None]:
        stream = subject.engine.generate(of_tokens("a", [5, 6], max_tokens=500, temperature=2.0))
        await anext(stream)
        assert subject.engine.load().running + subject.engine.load().waiting == 1
        await stream.aclose()
        aborted = subject.engine.generate(of_tokens("b", [5, 6], max_tokens=500, temperature=2.0, n=2))
        await anext(aborted)
        subject.engine.abort("unknown")
        subject.engine.abort("b")
        return [chunk.finish_reason async for chunk in aborted if chunk.finish_reason]

    assert asyncio.run(asyncio.wait_for(leave(), 60)) == ["abort", "abort"]
    load = subject.engine.load()
    assert load.running == load.waiting == load.tokens_in_flight == 0


def test_who_is_aborted_at_once_hears_of_it(subject: Subject) -> None:
    async def abort_at_once() -> list[str | None]:
        asked = asyncio.ensure_future(ask(subject.engine, of_tokens("a", [5, 6], max_tokens=500, temperature=2.0)))
        while not subject.engine.load().waiting + subject.engine.load().running:
            await asyncio.sleep(0)
        subject.engine.abort("a")
        return [chunk.finish_reason for chunk in await asked]

    assert asyncio.run(asyncio.wait_for(abort_at_once(), 60))[-1] == "abort"


def test_two_requests_of_one_id_are_two(subject: Subject) -> None:
    first, second = together(subject, *(of_tokens("same", [5, 6 + i], max_tokens=8 - 4 * i) for i in (0, 1)))
    assert tokens(first) == reference(subject.plain, [5, 6], 8)
    assert tokens(second) == reference(subject.plain, [5, 7], 4)


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_that_was_shut_down_ends_requests_and_is_not_healthy(
    kind: str, start_subject: Start, tiny_lm: TinyLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_subject(kind, tiny_lm("llama", **WIDER), tokenizer).engine
    reached, ended = threading.Event(), threading.Event()

    def compile_until_the_end(grammars: Grammars, schema: str) -> None:
        reached.set()
        ended.wait(60)

    monkeypatch.setattr(Grammars, "compile", compile_until_the_end)

    async def shut_down_midway() -> str | None:
        stream = engine.generate(of_tokens("a", [5, 6], max_tokens=500, temperature=2.0))
        await anext(stream)
        on_its_way = asyncio.ensure_future(ask(engine, of_tokens("b", [5, 6], json_schema="{}")))
        await asyncio.to_thread(reached.wait, 60)
        await asyncio.to_thread(engine.shutdown)
        ended.set()
        with pytest.raises(EngineError, match="down"):
            await on_its_way
        return [chunk async for chunk in stream][-1].finish_reason

    assert asyncio.run(asyncio.wait_for(shut_down_midway(), 100)) == "abort"
    with pytest.raises(EngineError, match="down"):
        engine.health()
