"""What a request brings and what goes back, as the door lets it through: bounded in time and bytes.

Knows ASGI messages. Does not know keys, routes, or what the bytes mean.
"""

import asyncio

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Send

from serve_apps.http_body import error_response
from serve_apps.openai_replies import BodyTooLarge, Failure, to_failure


class Passage:
    """What goes back to the caller: headers are added, bodies of HEAD are dropped, and nothing follows an end."""

    def __init__(self, send: Send, is_head: bool):
        self._send = send
        self._has_begun = False
        self._is_closed = False
        self.is_head = is_head
        self.headers: dict[str, str] = {}

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if self._is_closed:
            return
        if message["type"] == "http.response.start":
            self._has_begun = True
            headers = MutableHeaders(scope=message)
            for name, value in self.headers.items():
                headers[name] = value
        elif self.is_head and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)

    async def end(self, failure: Failure) -> None:
        """Refuse what is being read, whatever the route would say; an answer that has begun is left as it is."""
        if not self._has_begun:
            response = error_response(failure, {"connection": "close"})
            await response({"type": "http"}, _nothing, self.send)
        self._is_closed = True


class GuardedBody:
    """A request's body as routes read it: bounded in time, and in bytes where `max_bytes` says so.

    A body that breaks the bounds is refused here, and to the route it looks as if the caller had left.
    """

    def __init__(self, receive: Receive, passage: Passage, seconds: float, max_bytes: int | None):
        self._receive = receive
        self._passage = passage
        self._seconds = seconds
        self._deadline: float | None = None
        self._left = max_bytes
        self._is_whole = False

    async def receive(self) -> Message:
        """The next piece, or that the caller has left."""
        if self._is_whole:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._deadline is None:
            self._deadline = loop.time() + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            return await self._refuse(
                Failure(408, f"the body did not arrive within {self._seconds:g} seconds", "request_timeout")
            )
        self._is_whole = not message.get("more_body", False)
        if self._left is not None:
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                return await self._refuse(to_failure(BodyTooLarge("the request is larger than is allowed"), ""))
        return message

    async def _refuse(self, failure: Failure) -> Message:
        await self._passage.end(failure)
        self._is_whole = True
        return {"type": "http.disconnect"}


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
