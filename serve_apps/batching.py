"""What several callers bring at about the same time, worked on together.

In: one item a call. Out: its result. While one batch is worked on, the next one gathers.
Does not know what the items are. As `ray.serve.batch`, but for any process and any object.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Batcher(Generic[ItemT, ResultT]):
    """Gathers items; for one event loop.

    Args:
        work: items -> a result for each, in their order.
        max_size: of a batch.
        wait_s: how long an item waits for company.
    """

    def __init__(self, work: Callable[[list[ItemT]], Awaitable[list[ResultT]]], max_size: int, wait_s: float):
        self._work = work
        self._max_size = max_size
        self._wait_s = wait_s
        self._waiting: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        self._full = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, item: ItemT) -> ResultT:
        """The result of one item; who leaves before its batch begins is left out of it.

        Raises:
            Exception: what `work` raised, for each item of the batch.
        """
        result: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, result))
        if len(self._waiting) >= self._max_size:
            self._full.set()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await result

    async def _run(self) -> None:
        while self._waiting:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s):
                    await self._full.wait()
            batch = [(item, result) for item, result in self._waiting[: self._max_size] if not result.done()]
            del self._waiting[: self._max_size]
            if len(self._waiting) < self._max_size:
                self._full.clear()
            if batch:
                await self._work_on(batch)

    async def _work_on(self, batch: list[tuple[ItemT, asyncio.Future[ResultT]]]) -> None:
        try:
            results = await self._work([item for item, _ in batch])
        except Exception as error:
            for _, waiting in batch:
                if not waiting.done():
                    waiting.set_exception(error)
            return
        for (_, waiting), result in zip(batch, results, strict=True):
            if not waiting.done():
                waiting.set_result(result)
