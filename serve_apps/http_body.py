"""What every route does with a request's body, its id and its errors.

In: a request. Out: bytes within a bound, or OpenAI's error body as a response. Does not know what the bytes say.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve_apps.openai_replies import BodyTooLarge, Failure, to_failure
from serve_apps.request_record import record_of


async def answered(request: Request, work: Awaitable[Response], timeout_s: float) -> Response:
    """Await a route's work, within its time; an error becomes a response. Raises nothing but cancellation."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except Exception as error:
        return error_response(failure_of(error, request))


def failure_of(error: BaseException, request: Request) -> Failure:
    """What a request's caller is told of an error; its code is noted for the log."""
    given = clean_request_id(request.headers.get("x-request-id", ""))
    failure = to_failure(error, given or uuid.uuid4().hex)
    record_of(request).error = failure.code
    return failure


def error_response(failure: Failure, headers: dict[str, str] | None = None) -> Response:
    """A failure as an HTTP response, with `headers` besides its own."""
    return JSONResponse(failure.body, status_code=failure.status, headers=failure.headers | (headers or {}))


def event_stream(events: AsyncIterator[bytes]) -> Response:
    """Server-sent events as an HTTP response that proxies pass on as they come."""
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a request's body.

    Raises:
        BodyTooLarge: as `bounded_body`.
    """
    async with aclosing(bounded_body(request, max_bytes)) as pieces:
        return b"".join([piece async for piece in pieces])


async def bounded_body(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The pieces of a request's body.

    Raises:
        BodyTooLarge: it is longer than `max_bytes`. Of a longer one as much again is read and dropped, since many
            clients see a reset connection instead of the answer when nobody reads what they send.
    """
    n_bytes = 0
    async for piece in request.stream():
        n_bytes += len(piece)
        if n_bytes <= max_bytes:
            yield piece
        if n_bytes > 2 * max_bytes:
            break
    if n_bytes > max_bytes:
        raise BodyTooLarge(f"the request is larger than the {max_bytes} bytes that are allowed: send smaller files")


def clean_request_id(given: str) -> str:
    """A caller's request id, stripped of what has no business in one, so that it is safe to log; "" if nothing is left.

    Serve's HTTP proxy writes `x-request-id` on the response, whether the caller gave it or not.
    """
    return re.sub(r"[^A-Za-z0-9._:-]", "", given)[:128]
