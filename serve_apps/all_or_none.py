"""Several things at once, of which none goes on when one has failed.

Does not know what they are.
"""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


async def all_or_none(work: Iterable[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """Results in the order given; the first error is raised when what still ran has ended."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
