"""OpenAI's audio API: what is said in a file, whole or as it is heard, in its own language or in English.

In: forms. Out: JSON, text, subtitles or server-sent events. A disconnect or the deadline ends the transcription at the
window that it is at. Does not know models or weights.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from serve_apps.access import caller_of
from serve_apps.asking import again, begun, items, preceded
from serve_apps.http_body import error_response, event_stream, failure_of
from serve_apps.limits import Limits
from serve_apps.multipart import read_form
from serve_apps.openai_replies import DONE, event, require_model
from serve_apps.openai_speech import ALIAS, LISTS, SpeechRequest, field_names, form_schema, parse_speech_request
from serve_apps.request_record import RequestRecord, record_of
from serve_apps.speech import Heard, SpeechCall
from serve_apps.speech_replies import (
    all_heard,
    delta_event,
    done_event,
    json_body,
    srt_body,
    text_body,
    verbose_body,
    vtt_body,
)
from serve_apps.upload import Upload

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class SpeechApi:
    """Transcribes and translates.

    Args:
        whisper: handle of `WhisperDeployment`.
        models: the ids under which the assistant is asked for.
    """

    def __init__(self, whisper: "DeploymentHandle", models: Sequence[str], limits: Limits):
        self._whisper = whisper
        self._models = models
        self._limits = limits

    async def answer(self, request: Request, *, translate: bool) -> Response:
        """Answer `POST /v1/audio/transcriptions` or `/translations`; never raises but for cancellation."""
        record = record_of(request)
        deadline = asyncio.get_running_loop().time() + self._limits.request_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                lists = () if translate else LISTS
                form = await read_form(request, self._limits.max_body_bytes, field_names(translate=translate), lists)
                asked = parse_speech_request(form, self._limits, translate=translate)
                require_model(asked.model, caller_of(request).allowed([*self._models, ALIAS]))
                record.model, record.stream, record.audio_clips = asked.model, asked.stream, 1
                call = SpeechCall(Upload(form.file, "file"), asked.task, self._limits.max_transcription_seconds)
                del form

                def listen() -> AsyncGenerator[Heard, None]:
                    return self._listen(call, deadline, record)

                if not asked.stream:
                    return _reply(asked, await again(lambda: _whole(listen())))
                # The first piece is awaited before the status is sent, so that a refusal is a 4xx and not an event.
                first, pieces = await begun(lambda: _from_first_words(listen()))
            return event_stream(_events(asked, first, pieces, request))
        except Exception as error:
            return error_response(failure_of(error, request))

    async def _listen(self, call: SpeechCall, deadline: float, record: RequestRecord) -> AsyncGenerator[Heard, None]:
        """What is heard, piece by piece; closing the generator ends Whisper's work."""
        response = self._whisper.options(stream=True).listen.remote(call, record.trace.traceparent)
        async with aclosing(items(response, deadline)) as pieces:
            async for heard in pieces:
                record.audio_seconds = heard.seconds
                yield heard


async def _from_first_words(pieces: AsyncGenerator[Heard, None]) -> AsyncGenerator[Heard, None]:
    """Pieces from the first that holds a segment on, or the last where none does: until then nothing is told."""
    is_told, last = False, None
    async with aclosing(pieces):
        async for last in pieces:
            if is_told or last.segments:
                is_told = True
                yield last
    if not is_told and last is not None:
        yield last


async def _whole(pieces: AsyncGenerator[Heard, None]) -> Heard:
    async with aclosing(pieces):
        return all_heard([piece async for piece in pieces])


def _reply(asked: SpeechRequest, heard: Heard) -> Response:
    if asked.response_format == "json":
        return JSONResponse(json_body(heard))
    if asked.response_format == "verbose_json":
        return JSONResponse(verbose_body(asked, heard))
    if asked.response_format == "vtt":
        return PlainTextResponse(vtt_body(heard), media_type="text/vtt")
    return PlainTextResponse(srt_body(heard) if asked.response_format == "srt" else text_body(heard))


async def _events(
    asked: SpeechRequest, first: Heard, pieces: AsyncGenerator[Heard, None], request: Request
) -> AsyncIterator[bytes]:
    """Server-sent events of a stream; an error that comes now is an event too."""
    told: list[Heard] = []
    number = 0
    async with aclosing(pieces):
        try:
            async for heard in preceded(first, pieces):
                told.append(heard)
                for segment in heard.segments:
                    yield event(delta_event(asked, number, segment))
                    number += 1
        except Exception as error:
            yield event(failure_of(error, request).body)
        else:
            yield event(done_event(asked, all_heard(told)))
        yield DONE


def add_audio_routes(app: FastAPI, speech: SpeechApi) -> None:
    """Add `/v1/audio/transcriptions` and `/v1/audio/translations`."""

    @app.post("/v1/audio/transcriptions", openapi_extra=_described(translate=False), responses=_RESPONSES)
    async def transcriptions(request: Request) -> Response:
        """Write down what is said in a file."""
        return await speech.answer(request, translate=False)

    @app.post("/v1/audio/translations", openapi_extra=_described(translate=True), responses=_RESPONSES)
    async def translations(request: Request) -> Response:
        """Say in English what is said in a file."""
        return await speech.answer(request, translate=True)


def _described(*, translate: bool) -> dict[str, Any]:
    content = {"multipart/form-data": {"schema": form_schema(translate=translate)}}
    return {"requestBody": {"required": True, "content": content}}


_TEXT = {"schema": {"type": "string"}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What was said, in the format that was asked for.",
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}
            },
            "text/plain": _TEXT,
            "text/vtt": _TEXT,
            "text/event-stream": _TEXT,
        },
    }
}
