"""The reply bodies of OpenAI's chat completions API: whole, streamed, and errors.

In: chunks of an answer, transcripts, or an exception. Out: JSON-ready dictionaries and server-sent events.
`transcripts`, what was heard in each clip of the request, is our one extension. An exception of a deployment
arrives wrapped by Ray; it is unwrapped here, and nothing of a library's insides leaves the service.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from mmllm_core.engine.protocol import EngineChunk
from mmllm_core.errors import BadInput

_log = logging.getLogger("ray.serve")

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


class ModelNotFound(BadInput):
    """A model that is not served here."""

    code = "model_not_found"


class BodyTooLarge(BadInput):
    """A request body above the limit."""

    code = "request_too_large"


@dataclass(frozen=True)
class Reply:
    """The writer of one answer's bodies.

    Args:
        id: of the completion.
        model: as it was asked for.
        transcripts: what was heard, clip by clip.
    """

    id: str
    model: str
    transcripts: Sequence[str]
    created: int

    @classmethod
    def begin(cls, id: str, model: str, transcripts: Sequence[str]) -> "Reply":
        """A reply that is made now."""
        return cls(id, model, transcripts, int(time.time()))

    def whole(self, text: str, last: EngineChunk) -> Json:
        """The body of an answer that is not streamed; `last` is the answer's last chunk."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": last.finish_reason,
        }
        return self._body("chat.completion", [choice]) | {"usage": usage(last), "transcripts": list(self.transcripts)}

    def first(self) -> Json:
        """The stream's first chunk: the role and what was heard."""
        return self._chunk({"role": "assistant", "content": ""}, None) | {"transcripts": list(self.transcripts)}

    def piece(self, text: str) -> Json:
        """A chunk of text."""
        return self._chunk({"content": text}, None)

    def finish(self, last: EngineChunk) -> Json:
        """The chunk that says why the answer ended."""
        return self._chunk({}, last.finish_reason)

    def closing_usage(self, last: EngineChunk) -> Json:
        """The chunk that counts tokens, sent where `stream_options.include_usage` asks for it."""
        return self._body("chat.completion.chunk", []) | {"usage": usage(last)}

    def _chunk(self, delta: Json, finish_reason: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice])

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(last: EngineChunk) -> Json:
    """Token counts of an answer; images count as the positions they take."""
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }


def event(body: Json) -> bytes:
    """A body as a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


@dataclass(frozen=True)
class Failure:
    """An error as HTTP says it."""

    status: int
    message: str
    code: str | None
    param: str | None = None

    @property
    def body(self) -> Json:
        """OpenAI's error body."""
        kinds = {429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}
        kind = kinds.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come back, where that helps; a request that timed out would only time out again."""
        if self.status in (429, 503):
            return {"retry-after": "1"}
        return {"x-should-retry": "false"} if self.status == 504 else {}


def to_failure(error: BaseException, request_id: str) -> Failure:
    """Say an exception to the caller; one that nobody foresaw is logged and told in general words.

    Args:
        request_id: named in the log.
    """
    while isinstance(error, RayTaskError):
        error = error.cause
    if isinstance(error, BadInput):
        status = 404 if isinstance(error, ModelNotFound) else 413 if isinstance(error, BodyTooLarge) else 400
        return Failure(status, error.message, error.code, error.param)
    if isinstance(error, BackPressureError):
        return Failure(429, "the assistant has too many requests waiting: try again in a moment", "overloaded")
    if isinstance(error, TimeoutError):
        return Failure(504, "the answer took longer than a request may take: ask for less", "timeout")
    if isinstance(error, RayActorError | DeploymentUnavailableError | ReplicaUnavailableError):
        _log.warning("request %s: %s", request_id, error)
        return Failure(503, "a part of the assistant is restarting: try again in a moment", "unavailable")
    _log.error("request %s failed", request_id, exc_info=error)
    return Failure(500, "the assistant failed on this request; the failure was logged", "internal_error")
