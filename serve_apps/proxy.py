"""What Serve's HTTP proxies are given to do before requests reach the ingress.

Serve obeys headers of its own, whoever sends them: to switch deadlines and the end of abandoned requests off, and to
choose replicas. Callers of ours have no business there, and names or ids that are no UTF-8 make a proxy fail. Its list
of routes is nobody's business either. Proxies import this by name, through `PROXY_ENVIRONMENT`.
"""

import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_apps.http_body import clean_request_id, error_response
from serve_apps.openai_replies import Failure

PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_apps.proxy:middlewares"}
"""Environment variables of Ray's processes wherever a proxy runs."""

_OF_SERVE = re.compile(rb"x-request-timeout-seconds|x-request-disconnect-disabled|serve[-_]multiplexed[-_]model[-_]id")
_READ_BY_SERVE = re.compile(rb"x[-_]session[-_]id|traceparent")
_REQUEST_ID = b"x-request-id"


def middlewares() -> list[Middleware]:
    """What Serve asks for as it starts a proxy."""
    return [Middleware(Sifted)]


class Sifted:
    """The middleware: headers are sifted, and the list of routes is kept back."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            if scope["path"].rstrip("/") == "/-/routes":
                scope = {**scope, "type": "http"}
                await error_response(Failure(404, "this path is not offered", "not_found"))(scope, receive, send)
                return
            scope = {**scope, "headers": sifted(scope["headers"])}
        await self._app(scope, receive, send)


def sifted(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers as the ingress shall see them; a request id that nobody should log is cleaned, or left out."""
    kept: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if not name.isascii() or _OF_SERVE.fullmatch(name.lower()):
            continue
        if _READ_BY_SERVE.fullmatch(name.lower()) and not value.isascii():
            continue
        if name.lower() == _REQUEST_ID:
            value = clean_request_id(value.decode("latin-1")).encode()
            if not value or any(other == _REQUEST_ID for other, _ in kept):
                continue
        kept.append((name, value))
    return kept
