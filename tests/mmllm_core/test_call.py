"""Answers of a call reach whoever asked, each until its end."""

import asyncio

import pytest

from mmllm_core.engine.call import Call
from mmllm_core.engine.protocol import EngineChunk, EngineRequest, SamplingParams
from mmllm_core.errors import EngineError


def call_of(n: int, loop: asyncio.AbstractEventLoop) -> Call:
    return Call(EngineRequest("a", token_ids=(5,), sampling=SamplingParams(n=n)), loop)


def chunk(index: int, ends: bool = False) -> EngineChunk:
    return EngineChunk("x", (7,), 1, 1, "abort" if ends else None, index)


def test_a_second_end_of_one_answer_ends_no_other() -> None:
    async def receive() -> list[tuple[int, bool]]:
        call = call_of(2, asyncio.get_running_loop())
        for item in (chunk(0), chunk(0, True), chunk(0, True), chunk(1), chunk(1, True), chunk(1)):
            call.send(item)
        return [(found.index, found.finish_reason is not None) async for found in call.answers()]

    assert asyncio.run(receive()) == [(0, False), (0, True), (1, False), (1, True)]


def test_an_error_ends_the_call_by_its_name() -> None:
    async def receive(error: Exception) -> None:
        call = call_of(1, asyncio.get_running_loop())
        call.send(error)
        async for _ in call.answers():
            pass

    with pytest.raises(EngineError, match=r"^out of pages$"):
        asyncio.run(receive(EngineError("out of pages")))
    with pytest.raises(EngineError, match="generation failed: odd"):
        asyncio.run(receive(ValueError("odd")))
