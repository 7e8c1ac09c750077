"""One computation for all who want the same thing at the same time.

In: a key and how to compute it. Out: the result, for everybody who asked before it was there. Nothing is remembered
afterwards. Does not know what is computed.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

ResultT = TypeVar("ResultT")


@dataclass
class _Flight(Generic[ResultT]):
    task: asyncio.Task[ResultT]
    waiting: int = 0


class SingleFlight(Generic[ResultT]):
    """Computations that are under way, by key. For one event loop."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[ResultT]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def run(self, key: str, work: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """The result of `work`, or of whoever began the same before; its error is everybody's.

        Who is cancelled takes nothing from the others; when nobody waits any more the work is cancelled.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(work()))
            flight.task.add_done_callback(lambda _: self._land(key, flight))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if flight.waiting == 0 and not flight.task.done():
                self._land(key, flight)  # who comes now begins anew
                flight.task.cancel()

    def _land(self, key: str, flight: _Flight[ResultT]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
