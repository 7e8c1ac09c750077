"""The reply bodies of OpenAI's chat completions API: whole, streamed, and errors.

In: chunks of an answer, transcripts, or an exception. Out: JSON-ready dictionaries and server-sent events.
`transcripts`, what was heard in each clip of the request, and `images`, where each image's features were found, are
our two extensions. An exception of a deployment arrives wrapped by Ray; it is unwrapped here, and nothing of a
library's insides leaves the service.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect

from mmllm_core.engine.protocol import EngineChunk, TokenLogprob
from mmllm_core.errors import BadInput, DeadlineError
from serve_apps.ray_process import has_no_room, is_away, unwrapped

_log = logging.getLogger("ray.serve")

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"
_NEVER = -9999.0
"""What OpenAI's API says of a token that is out of the question; JSON knows no infinity."""


class ModelNotFound(BadInput):
    """A model that is not served here."""

    code = "model_not_found"
    status = 404


def require_model(model: str, known: Sequence[str]) -> None:
    """Refuse a model that is not one of those `known`: of what there is, what the caller may ask for.

    Raises:
        ModelNotFound: it names those that are.
    """
    if model not in known:
        there_are = "' or '".join(known)
        mend = f"ask for '{there_are}'" if known else "your API key may ask for none of those that are served"
        raise ModelNotFound(f"this model does not exist here: {mend}", "model")


class BodyTooLarge(BadInput):
    """A request body above the limit."""

    code = "request_too_large"
    status = 413


@dataclass(frozen=True)
class Reply:
    """The writer of one request's bodies.

    Args:
        id: of the completion.
        model: as it was asked for.
        transcripts: what was heard, clip by clip.
        tiers: where features were found, image by image.
        n: answers.
        vocabulary: bytes of each token, where log-probabilities are told.
    """

    id: str
    model: str
    transcripts: Sequence[str]
    tiers: Sequence[str]
    created: int
    n: int = 1
    vocabulary: Sequence[bytes] = ()

    def whole(self, answers: Sequence[Sequence[EngineChunk]]) -> Json:
        """The body of what is not streamed, from all chunks of each answer."""
        choices = []
        for chunks in answers:
            text = "".join(chunk.text for chunk in chunks)
            message = {"role": "assistant", "content": text, "refusal": None}
            logprobs = self._logprobs(
                [logprob for chunk in chunks for logprob in chunk.logprobs], bool(self.vocabulary)
            )
            choices.append(
                {
                    "index": chunks[-1].index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": chunks[-1].finish_reason,
                }
            )
        last = [chunks[-1] for chunks in answers]
        return self._body("chat.completion", choices) | {"usage": usage(last)} | self._perceived

    def first(self) -> list[Json]:
        """A stream's first chunks, one of each answer: the role and what was seen and heard."""
        chunks = [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.n)]
        return [chunk | self._perceived for chunk in chunks]

    def piece(self, chunk: EngineChunk) -> Json:
        """A chunk of text."""
        return self._chunk(chunk.index, {"content": chunk.text}, self._logprobs(chunk.logprobs, bool(chunk.logprobs)))

    def finish(self, last: EngineChunk) -> Json:
        """The chunk that says why an answer ended."""
        return self._chunk(last.index, {}, finish_reason=last.finish_reason)

    def closing_usage(self, last: Sequence[EngineChunk]) -> Json:
        """The chunk that counts tokens, sent where `stream_options.include_usage` asks for it."""
        return self._body("chat.completion.chunk", []) | {"usage": usage(last)}

    @property
    def _perceived(self) -> Json:
        return {"transcripts": list(self.transcripts), "images": list(self.tiers)}

    def _chunk(self, index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice])

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _logprobs(self, logprobs: Sequence[TokenLogprob], are_told: bool) -> Json | None:
        if not are_told:
            return None
        told = [
            self._token(logprob.token_id, logprob.logprob)
            | {"top_logprobs": [self._token(token, value) for token, value in logprob.top]}
            for logprob in logprobs
        ]
        return {"content": told, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        known = self.vocabulary[token] if token < len(self.vocabulary) else b""  # some LMs have spare rows
        text = known.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, _NEVER), "bytes": list(known)}


def usage(last: Sequence[EngineChunk]) -> Json:
    """Token counts of all answers, from the last chunk of each; images count as the positions they take."""
    prompt, completion = last[0].prompt_tokens, sum(chunk.completion_tokens for chunk in last)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(chunk.cached_tokens for chunk in last)},
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
    retry_after_s: int = 1

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
            return {"retry-after": str(self.retry_after_s)}
        return {"x-should-retry": "false"} if self.status == 504 else {}


class Overloaded(Exception):
    """A request for which there is no room now."""


OVERLOADED = Failure(429, "the assistant has too many requests waiting: try again in a moment", "overloaded")


def to_failure(error: BaseException, request_id: str) -> Failure:
    """Say an exception to the caller; one that nobody foresaw is logged and told in general words.

    Args:
        request_id: named in the log.
    """
    error = unwrapped(error)
    if isinstance(error, BadInput):
        return Failure(getattr(error, "status", 400), error.message, error.code, error.param)
    if isinstance(error, ClientDisconnect):
        return Failure(499, "the request broke off", "client_closed_request")
    if isinstance(error, Overloaded) or has_no_room(error):
        return OVERLOADED
    if isinstance(error, TimeoutError | DeadlineError):
        return Failure(504, "the answer took longer than a request may take: ask for less", "timeout")
    if is_away(error):
        _log.warning("request %s: %s", request_id, error)
        return Failure(503, "a part of the assistant is restarting: try again in a moment", "unavailable")
    _log.error("request %s failed", request_id, exc_info=error)
    return Failure(500, "the assistant failed on this request; the failure was logged", "internal_error")
