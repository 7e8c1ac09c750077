"""How many chats are let in at a time: as many as the LM can answer and let wait.

Images and speech of more would be seen and heard for answers that the LM then refuses, and take that time from those
that it gives. A pure ASGI middleware. Does not know bodies.
"""

import math
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.http_body import error_response
from serve_apps.openai_replies import OVERLOADED, Overloaded
from serve_apps.request_record import record_in

if TYPE_CHECKING:
    from serve_apps.config import ServeConfig

CHAT = "/v1/chat/completions"


def capacity(config: "ServeConfig") -> int:
    """Chats that one ingress replica lets in, where there are as few of them as there may be.

    Never all that it can hold: others would wait in Serve's proxy, where no deadline ends them, and health checks too.
    """
    phi, ingress = config.phi, config.ingress
    most = max(1, ingress.max_ongoing_requests * 9 // 10)
    if phi.max_queued_requests < 0:
        return most
    n_ingress = ingress.autoscaling.min_replicas if ingress.autoscaling else ingress.num_replicas or 1
    of_lm = phi.max_ongoing_requests * phi.max_replicas + phi.max_queued_requests
    return min(most, math.ceil(of_lm / n_ingress))


class Admission:
    """The middleware; what it turns away gets 429 and may come back.

    A chat has a place from when its body is here: those that come slowly keep nobody out.
    """

    def __init__(self, app: ASGIApp, config: "ServeConfig"):
        self._app = app
        self._capacity = capacity(config)
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_chat = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(CHAT)
        most = self._capacity
        if not is_chat:
            await self._app(scope, receive, send)
            return
        if self._inside >= most:
            record_in(scope).error = OVERLOADED.code
            await error_response(OVERLOADED)(scope, receive, send)
            return
        is_in = False

        async def received() -> Message:
            nonlocal is_in
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False) and not is_in:
                if self._inside >= most:
                    raise Overloaded
                self._inside += 1
                is_in = True
            return message

        try:
            await self._app(scope, received, send)
        finally:
            self._inside -= is_in
