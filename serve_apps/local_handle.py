"""A deployment in this process, asked as Ray Serve's handles are: `handle.method.remote(...)`.

In: an object with plain, async or async-generator methods. Out: what they give, awaited or iterated, until `cancel`.
Calls pass references, within one event loop; nothing is queued or scaled. Does not know what the object does.
"""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Generator
from typing import Any


class LocalHandle:
    """Stands where a `DeploymentHandle` would."""

    def __init__(self, deployment: object):
        self._deployment = deployment

    def options(self, **_: Any) -> "LocalHandle":
        """Itself: there is one replica, and a method says itself whether it streams."""
        return self

    def __getattr__(self, name: str) -> "LocalMethod":
        return LocalMethod(getattr(self._deployment, name))


class LocalMethod:
    """A method of the deployment."""

    def __init__(self, method: Any):
        self._method = method

    def remote(self, *args: Any) -> "LocalResponse | LocalStream":
        """Begin the call."""
        if inspect.isasyncgenfunction(self._method):
            return LocalStream(self._method(*args))
        return LocalResponse(asyncio.ensure_future(self._result(args)))

    async def _result(self, args: tuple[Any, ...]) -> Any:
        result = self._method(*args)
        return await result if inspect.isawaitable(result) else result


class LocalResponse:
    """A call's result, to be awaited."""

    def __init__(self, task: "asyncio.Task[Any]"):
        self._task = task

    def __await__(self) -> Generator[Any, None, Any]:
        return self._task.__await__()

    def cancel(self) -> None:
        """End the call, if it still runs."""
        self._task.cancel()


_closing: set["asyncio.Task[None]"] = set()


class LocalStream:
    """A call's items."""

    def __init__(self, items: AsyncGenerator[Any, None]):
        self._items = items

    def __aiter__(self) -> "LocalStream":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        """Close the stream, as a caller's leaving does."""
        task = asyncio.create_task(self._items.aclose())
        _closing.add(task)
        task.add_done_callback(_closing.discard)
