"""How many chats are let in at a time: as many as the LM can answer and let wait.

Images and speech of more would be seen and heard for answers that the LM then refuses, and take that time from those
that it gives. A pure ASGI middleware. Does not know bodies.
"""

import math
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_apps.http_body import error_response
from serve_apps.openai_replies import OVERLOADED
from serve_apps.request_record import RequestRecord

if TYPE_CHECKING:
    from serve_apps.config import ServeConfig

CHAT = "/v1/chat/completions"


def capacity(config: "ServeConfig") -> int | None:
    """Chats that one ingress replica lets in, where there are as few of them as there may be; None for any number."""
    phi, ingress = config.phi, config.ingress
    if phi.max_queued_requests < 0:
        return None
    n_ingress = ingress.autoscaling.min_replicas if ingress.autoscaling else ingress.num_replicas or 1
    return math.ceil((phi.max_ongoing_requests * phi.max_replicas + phi.max_queued_requests) / n_ingress)


class Admission:
    """The middleware; what it turns away gets 429 and may come back."""

    def __init__(self, app: ASGIApp, config: "ServeConfig"):
        self._app = app
        self._capacity = capacity(config)
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_chat = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(CHAT)
        if not is_chat or self._capacity is None:
            await self._app(scope, receive, send)
            return
        if self._inside >= self._capacity:
            record: RequestRecord = scope.setdefault("mmllm.record", RequestRecord())
            record.error = OVERLOADED.code
            await error_response(OVERLOADED)(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1
