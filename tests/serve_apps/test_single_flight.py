"""One computation for all who want the same at once, whoever of them leaves."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from serve_apps.single_flight import SingleFlight


class Work:
    """Counts how often it was begun and how it ended."""

    def __init__(self, error: Exception | None = None):
        self.begun = self.cancelled = 0
        self.go = asyncio.Event()
        self._error = error

    async def run(self) -> int:
        self.begun += 1
        number = self.begun
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._error:
            raise self._error
        return number


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def test_many_share_one_computation_and_nothing_is_remembered() -> None:
    async def scene() -> None:
        flights: SingleFlight[int] = SingleFlight()
        work = Work()
        asked = [asyncio.create_task(flights.run("a", work.run)) for _ in range(10)]
        other = asyncio.create_task(flights.run("b", work.run))
        await asyncio.sleep(0.01)
        work.go.set()
        assert await asyncio.gather(*asked) == [1] * 10
        assert await other == 2
        assert len(flights) == 0
        assert await flights.run("a", work.run) == 3

    run(scene())


def test_the_first_one_leaving_fails_nobody() -> None:
    async def scene() -> None:
        flights: SingleFlight[int] = SingleFlight()
        work = Work()
        first, *others = [asyncio.create_task(flights.run("a", work.run)) for _ in range(3)]
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        work.go.set()
        assert await asyncio.gather(*others) == [1, 1]
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (work.begun, work.cancelled) == (1, 0)

    run(scene())


def test_when_all_have_left_the_work_ends_and_who_comes_then_begins_anew() -> None:
    async def scene() -> None:
        flights: SingleFlight[int] = SingleFlight()
        work = Work()
        asked = [asyncio.create_task(flights.run("a", work.run)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for one in asked:
            one.cancel()
        late = asyncio.create_task(flights.run("a", work.run))
        await asyncio.gather(*asked, return_exceptions=True)
        await asyncio.sleep(0.01)
        work.go.set()
        assert await late >= 1
        assert work.begun - work.cancelled == 1
        assert len(flights) == 0

    run(scene())


def test_an_error_is_everybodys_and_is_not_remembered() -> None:
    async def scene() -> None:
        flights: SingleFlight[int] = SingleFlight()
        work = Work(ValueError("broke"))
        asked = [asyncio.create_task(flights.run("a", work.run)) for _ in range(3)]
        await asyncio.sleep(0.01)
        work.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [str(error) for error in found] == ["broke"] * 3
        assert len(flights) == 0

    run(scene())
