"""A replica that dies is asked for again a few times; a deployment that is late is left, and told so."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError

from serve_apps.asking import ATTEMPTS, again, begun, items, preceded
from serve_apps.local_handle import LocalHandle


class Asked:
    """Fails by the errors given, one a call, and then answers."""

    def __init__(self, *errors: Exception):
        self.n_calls = 0
        self._errors = list(errors)

    async def answer(self) -> str:
        self.n_calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return "answer"

    async def stream(self) -> AsyncGenerator[str, None]:
        yield await self.answer()
        yield "more"


def died(n: int) -> list[Exception]:
    return [ActorDiedError() for _ in range(n)]


def test_who_asked_a_replica_that_died_is_answered_by_another() -> None:
    asked = Asked(*died(ATTEMPTS - 1))
    assert asyncio.run(again(asked.answer)) == "answer"


def test_an_answer_that_was_lost_with_its_host_is_asked_for_again() -> None:
    asked = Asked(ObjectLostError("00", None, ""))
    assert asyncio.run(again(asked.answer)) == "answer"


def test_a_request_takes_no_more_replicas_with_it_than_it_has_attempts() -> None:
    asked = Asked(*died(ATTEMPTS + 1))
    with pytest.raises(ActorDiedError):
        asyncio.run(again(asked.answer))
    assert asked.n_calls == ATTEMPTS


def test_another_error_is_not_asked_again() -> None:
    asked = Asked(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(again(asked.answer))
    assert asked.n_calls == 1


def test_a_stream_whose_replica_dies_before_its_first_item_begins_anew() -> None:
    asked = Asked(*died(1))

    async def told() -> list[str]:
        first, rest = await begun(asked.stream)
        return [item async for item in preceded(first, rest)]

    assert asyncio.run(told()) == ["answer", "more"]


class Slow:
    """Streams an item, and then nothing until it is left."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def stream(self) -> AsyncGenerator[str, None]:
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            self.left.set()


def test_a_stream_that_is_late_is_ended_where_it_is_computed() -> None:
    async def told() -> str:
        slow = Slow()
        response: Any = LocalHandle(slow).stream.remote()
        stream = items(response, asyncio.get_running_loop().time() + 0.05)
        first: str = await anext(stream)
        with pytest.raises(TimeoutError):
            await anext(stream)
        await asyncio.wait_for(slow.left.wait(), 10)
        return first

    assert asyncio.run(told()) == "first"
