"""A batch that fails fails for its own items alone, and who left before it began is left out of it."""

import asyncio

import pytest

from serve_apps.batching import Batcher


class Work:
    """Doubles numbers; refuses a batch that holds a negative one."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    async def __call__(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        await asyncio.sleep(0)
        if min(numbers) < 0:
            raise ValueError("negative")
        return [2 * number for number in numbers]


def test_those_who_come_together_are_worked_on_together_up_to_the_size() -> None:
    async def run() -> tuple[list[int], list[list[int]]]:
        work = Work()
        batcher = Batcher(work, max_size=2, wait_s=0.01)
        return await asyncio.gather(*map(batcher, [1, 2, 3])), work.batches

    assert asyncio.run(run()) == ([2, 4, 6], [[1, 2], [3]])


def test_a_batch_that_fails_is_no_error_of_the_next() -> None:
    async def run() -> list[int | BaseException]:
        batcher = Batcher(Work(), max_size=2, wait_s=0.01)
        return await asyncio.gather(*map(batcher, [-1, 2, 3]), return_exceptions=True)

    refused, beside, following = asyncio.run(run())
    assert isinstance(refused, ValueError)
    assert isinstance(beside, ValueError)
    assert following == 6


def test_who_left_before_the_batch_began_is_left_out_of_it() -> None:
    async def run() -> list[list[int]]:
        work = Work()
        batcher = Batcher(work, max_size=8, wait_s=0.01)
        leaving, staying = asyncio.create_task(batcher(1)), asyncio.create_task(batcher(2))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await staying == 4
        return work.batches

    assert asyncio.run(run()) == [[2]]
