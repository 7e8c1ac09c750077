"""What fails ends what ran beside it, and is told when that has ended."""

import asyncio

import pytest

from serve_apps.all_or_none import all_or_none


class Beside:
    """Runs until it is cancelled, and takes a moment to end."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = False

    async def run(self) -> str:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.ended = True
        return "never"


async def told(text: str) -> str:
    return text


def test_results_come_in_the_order_in_which_they_were_asked_for() -> None:
    assert asyncio.run(all_or_none(map(told, ["a", "b"]))) == ["a", "b"]


def test_the_first_error_is_told_when_all_else_has_ended() -> None:
    async def fail(beside: Beside) -> str:
        await beside.begun.wait()
        raise ValueError("first")

    async def run() -> bool:
        beside = Beside()
        with pytest.raises(ValueError, match="first"):
            await all_or_none([beside.run(), fail(beside)])
        return beside.ended

    assert asyncio.run(run())


def test_who_leaves_ends_everything() -> None:
    async def run() -> bool:
        beside = Beside()
        task = asyncio.create_task(all_or_none([beside.run()]))
        await beside.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return beside.ended

    assert asyncio.run(run())
