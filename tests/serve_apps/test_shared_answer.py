"""One answer for all who ask at about the same time; an error is for those who waited for it."""

import asyncio

import pytest

from serve_apps.shared_answer import SharedAnswer


class Work:
    """Counts how often it is done; fails the first `failures` times."""

    def __init__(self, failures: int = 0):
        self.done = 0
        self._failures = failures

    async def __call__(self) -> int:
        self.done += 1
        await asyncio.sleep(0)
        if self.done <= self._failures:
            raise RuntimeError("no answer")
        return self.done


def test_an_answer_holds_for_all_who_ask_meanwhile_and_a_while_after() -> None:
    async def ask() -> list[int]:
        shared = SharedAnswer(Work(), seconds=1e9)
        return [*await asyncio.gather(shared.get(), shared.get()), await shared.get()]

    assert asyncio.run(ask()) == [1, 1, 1]


def test_an_answer_that_is_too_old_is_found_anew() -> None:
    async def ask() -> list[int]:
        shared = SharedAnswer(Work(), seconds=-1)
        return [await shared.get(), await shared.get()]

    assert asyncio.run(ask()) == [1, 2]


def test_an_error_is_for_those_who_waited_and_not_for_who_asks_next() -> None:
    async def ask() -> int:
        shared = SharedAnswer(Work(failures=1), seconds=1e9)
        for error in await asyncio.gather(shared.get(), shared.get(), return_exceptions=True):
            assert isinstance(error, RuntimeError)
        return await shared.get()

    assert asyncio.run(ask()) == 2


def test_who_leaves_takes_nothing_from_the_others() -> None:
    async def ask() -> int:
        shared = SharedAnswer(Work(), seconds=1e9)
        leaving, staying = asyncio.create_task(shared.get()), asyncio.create_task(shared.get())
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return await staying

    assert asyncio.run(ask()) == 1
