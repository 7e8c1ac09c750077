"""One answer for all who ask at about the same time.

In: how to find it. Out: what was found, for everybody who asked meanwhile, and for a while after. Does not know what is
asked. Where many things are asked for, and nothing is to be remembered: `serve_apps.single_flight`.
"""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

AnswerT = TypeVar("AnswerT")


class SharedAnswer(Generic[AnswerT]):
    """For one event loop.

    Args:
        work: finds the answer.
        seconds: that it holds once it is found. An error is for those who waited for it alone.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, AnswerT]], seconds: float):
        self._work = work
        self._seconds = seconds
        self._asking: asyncio.Task[AnswerT] | None = None
        self._found_at = -math.inf

    async def get(self) -> AnswerT:
        """The answer; who leaves takes nothing from the others.

        Raises:
            Exception: what `work` raised.
        """
        stale = time.monotonic() - self._found_at > self._seconds
        if self._asking is None or (self._asking.done() and stale):
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> AnswerT:
        answer = await self._work()
        self._found_at = time.monotonic()
        return answer
