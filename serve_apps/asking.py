"""Asks again where the replica that was asked died before the caller was told anything.

Does not know what is asked.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from serve_apps.ray_process import replica_died

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentResponse

T = TypeVar("T")

ATTEMPTS = 3
"""Replicas that one request may take with it, were it the reason why they die."""


async def again(work: Callable[[], Awaitable[T]]) -> T:
    """What `work` gives; where a replica dies, all of it is done anew.

    Raises:
        Exception: what `work` raised; where every replica that was asked died, that.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return await work()
        except Exception as error:
            if not replica_died(error):
                raise
    return await work()


async def ask(send: Callable[[], "DeploymentResponse"]) -> Any:
    """A deployment's answer to what `send` sends; whoever stops waiting for it cancels the call."""
    return await again(lambda: _result(send()))


async def begun(start: Callable[[], AsyncGenerator[T, None]]) -> tuple[T, AsyncGenerator[T, None]]:
    """A stream's first item, and the rest. What dies later cannot be asked again: its beginning is told already.

    Raises:
        StopAsyncIteration: there is none.
    """
    return await again(lambda: _first(start()))


async def items(response: Any, deadline: float) -> AsyncGenerator[Any, None]:
    """What a deployment streams; closing the generator cancels the call.

    Args:
        response: of a handle with `stream=True`.
        deadline: by the event loop's clock.

    Raises:
        TimeoutError: an item did not come before it.
        Exception: what the deployment raised.
    """
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await anext(response)
            except StopAsyncIteration:
                return
            yield item
    finally:
        response.cancel()


async def preceded(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    """A stream whose first item was taken from it."""
    yield first
    async for item in rest:
        yield item


async def _result(response: "DeploymentResponse") -> Any:
    try:
        return await response
    except BaseException:
        response.cancel()
        raise


async def _first(stream: AsyncGenerator[T, None]) -> tuple[T, AsyncGenerator[T, None]]:
    try:
        return await anext(stream), stream
    except BaseException:
        await stream.aclose()
        raise
