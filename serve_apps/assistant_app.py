"""The assistant as an HTTP service: OpenAI's chat completions over CLIP, Whisper and the LM.

In: HTTP requests. Out: whole or streamed answers, and OpenAI's error body for everything that goes wrong. A request
is read and checked here, CLIP and Whisper begin at once, and the LM speaks when both are done; only its hop streams.
A disconnect or the deadline cancels whatever still runs for a request. Does not know models or weights.
"""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from mmllm_core.engine.protocol import EngineChunk
from mmllm_core.errors import EngineError
from serve_apps.access import Caller, caller_of, guard
from serve_apps.admission import Admission
from serve_apps.asking import again, ask, begun, items, preceded
from serve_apps.audio_api import SpeechApi, add_audio_routes
from serve_apps.config import ServeConfig
from serve_apps.embedding_protocol import parse_embedding_request
from serve_apps.files_api import FilesApi
from serve_apps.http_body import error_response, event_stream, failure_of, read_body
from serve_apps.http_errors import answer_errors, answer_unknown_paths, describe
from serve_apps.image_fetch import ImageFetcher
from serve_apps.media import Elsewhere
from serve_apps.media_routes import add_embedding_route, add_file_routes
from serve_apps.metrics_page import add_metrics_route
from serve_apps.openai_protocol import ChatCall, ChatRequest, StreamOptions, parse_request, with_transcripts
from serve_apps.openai_replies import (
    DONE,
    Json,
    ModelNotFound,
    Reply,
    event,
    require_model,
    usage,
)
from serve_apps.perception import Fingerprints, Perceiver, Perception
from serve_apps.prompt import Prompt
from serve_apps.readiness import Readiness
from serve_apps.request_record import Recorded, RequestRecord, record_of

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class Assistant:
    """The ingress deployment.

    Args:
        clip, whisper, phi: handles of `ClipDeployment`, `WhisperDeployment` and `PhiDeployment`.
        models: the ids that can be asked for, the usual one first.
        fingerprints: of what sees and hears.
        profile: of the models, by name.
    """

    def __init__(
        self,
        clip: "DeploymentHandle",
        whisper: "DeploymentHandle",
        phi: "DeploymentHandle",
        models: list[str],
        config: ServeConfig,
        fingerprints: Fingerprints,
        profile: str,
    ):
        self._phi = phi
        fetcher = ImageFetcher(config.image_urls) if config.image_urls else None
        self._perceiver = Perceiver(clip, whisper, fingerprints, fetcher, config.ingress.cache_bytes)
        self.files = FilesApi(config.files, self._perceiver) if config.files else None
        self._vocabulary: list[bytes] = []
        self._readiness = Readiness(clip, whisper, phi, config)
        self.speech = SpeechApi(whisper, models, config.limits)
        self._models = models
        self._profile = profile
        self.config = config
        self._started = int(time.time())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.app()  # Serve calls this inside the replica: neither app nor chat page has to survive pickling

    def app(self) -> FastAPI:
        """All that answers HTTP: the routes behind the door, and the chat page where the config wants it."""
        app = build_http_app(self)
        app.add_middleware(Admission, config=self.config)
        guard(app, self.config)
        app.add_middleware(Recorded, config=self.config.observability)  # before the door: what it refuses is told too
        if self.config.ui:
            os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
            from serve_apps.chat_page.page import mount_chat_page

            mount_chat_page(app, self.config.http.base_url, self._models[0])
        return app

    def service_config(self) -> ServeConfig:
        """The config of this service."""
        return self.config

    def models(self, caller: Caller) -> list[Json]:
        """The models that a caller can ask for."""
        told = {"object": "model", "created": self._started, "owned_by": "mmllm", "profile": self._profile}
        return [{"id": model} | told for model in caller.allowed(self._models)]

    async def ready(self) -> Response:
        """Say which parts answer; 503 if one does not that should."""
        states = await self._readiness.states()
        ready = "not ready" not in states.values()
        return JSONResponse({"status": "ready" if ready else "not ready"} | states, 200 if ready else 503)

    async def chat(self, request: Request) -> Response:
        """Answer `POST /v1/chat/completions`; never raises but for cancellation."""
        record = record_of(request)
        deadline = asyncio.get_running_loop().time() + self.config.limits.request_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                body = await read_body(request, self.config.limits.max_body_bytes)
                # base64 of megabytes takes its time: other requests should not wait for it
                call = await asyncio.to_thread(parse_request, body, self.config.limits, self._elsewhere(request))
                del body
                require_model(call.model, caller_of(request).allowed(self._models))
                record.model, record.stream = call.model, call.stream
                seen = await self._perceive(call, record)
                reply = await self._reply(call, seen)

                def speak() -> AsyncGenerator[EngineChunk, None]:
                    return self._speak(call, seen, reply.id, deadline, record)

                if not call.stream:
                    return JSONResponse(await again(lambda: _whole(reply, speak())))
                # The first chunk is awaited before the status is sent, so that a refusal is a 4xx and not an event.
                first, chunks = await begun(speak)
            return event_stream(_events(reply, first, chunks, call.stream_options, request))
        except Exception as error:
            return error_response(failure_of(error, request))

    async def _perceive(self, call: ChatCall, record: RequestRecord) -> Perception:
        record.images, record.audio_clips = len(call.images), len(call.clips)
        with record.trace.span("perceive") as (_, trace):
            seen = await self._perceiver.perceive(call.images, call.clips, trace.traceparent)
        record.audio_seconds, record.perceived = seen.audio_seconds, time.perf_counter()
        return seen

    async def embed(self, request: Request) -> Response:
        """Answer `POST /v1/embeddings`.

        Raises:
            BadInput: something cannot be embedded; it names the field.
        """
        limits = self.config.limits
        body = await read_body(request, limits.max_body_bytes)
        call = await asyncio.to_thread(parse_embedding_request, body, limits, self._elsewhere(request))
        del body
        require_model(call.model, caller_of(request).allowed(self._models))
        record_of(request).model = call.model
        found = await self._perceiver.embed(call.inputs, call.dimensions)
        record_of(request).prompt_tokens = found.tokens
        return JSONResponse(await asyncio.to_thread(call.reply, found))

    def _elsewhere(self, request: Request) -> Elsewhere:
        return Elsewhere(self.files.of(request) if self.files else None, self.config.image_urls is not None)

    async def _reply(self, call: ChatCall, seen: Perception) -> Reply:
        if call.sampling.logprobs is not None and not self._vocabulary:
            self._vocabulary = await ask(self._phi.vocabulary.remote)
        told = self._vocabulary if call.sampling.logprobs is not None else []
        id, now = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        return Reply(id, call.model, seen.transcripts, seen.tiers, now, call.sampling.n, told)

    async def _speak(
        self, call: ChatCall, seen: Perception, id: str, deadline: float, record: RequestRecord
    ) -> AsyncGenerator[EngineChunk, None]:
        """The LM's chunks, until each answer has ended; closing the generator cancels the LM's request."""
        record.begin_answer()
        messages = with_transcripts(call, seen.transcripts)
        seconds = deadline - asyncio.get_running_loop().time()
        model = call.model if len(self._models) > 1 else ""  # of one there is nothing to choose
        prompt = Prompt(id, messages, seen.features, call.sampling, seconds, model, record.trace.traceparent)
        response = self._phi.options(stream=True, multiplexed_model_id=model).generate.remote(prompt)
        unfinished = call.sampling.n
        async with aclosing(items(response, deadline)) as chunks:
            async for chunk in chunks:
                record.note(chunk)
                if chunk.finish_reason == "abort":
                    raise EngineError("the engine ended the request before the answer was done")
                yield chunk
                unfinished -= chunk.finish_reason is not None
                if not unfinished:
                    return
        raise EngineError("the answer ended without a reason")


async def _whole(reply: Reply, chunks: AsyncGenerator[EngineChunk, None]) -> Json:
    answers: list[list[EngineChunk]] = [[] for _ in range(reply.n)]
    async with aclosing(chunks):
        async for chunk in chunks:
            answers[chunk.index].append(chunk)
    return reply.whole(answers)


async def _events(
    reply: Reply,
    first: EngineChunk,
    chunks: AsyncGenerator[EngineChunk, None],
    options: StreamOptions,
    request: Request,
) -> AsyncIterator[bytes]:
    """Server-sent events of a streamed answer; an error that comes now is an event too."""
    latest: dict[int, EngineChunk] = {}
    async with aclosing(chunks):
        for opening in reply.first():
            yield event(opening)
        try:
            async for chunk in preceded(first, chunks):
                latest[chunk.index] = chunk
                so_far = {"usage": usage(list(latest.values()))} if options.continuous_usage_stats else {}
                if chunk.text or chunk.logprobs:
                    yield event(reply.piece(chunk) | so_far)
                if chunk.finish_reason is not None:
                    yield event(reply.finish(chunk) | so_far)
        except Exception as error:
            yield event(failure_of(error, request).body)
        else:
            if options.include_usage:
                yield event(reply.closing_usage(list(latest.values())))
        yield DONE


def build_http_app(assistant: Assistant) -> FastAPI:
    """The HTTP routes of an assistant, without the chat page."""
    app = FastAPI(title="mmllm", description="CLIP sees, Whisper hears, a Phi model answers.", redoc_url=None)

    answer_errors(app)
    body = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts_of_body = body.pop("$defs")
    content = {"application/json": {"schema": body}}

    answers: dict[int | str, Json] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}

    @app.post(
        "/v1/chat/completions",
        responses=answers,
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation of text, images and speech."""
        return await assistant.chat(request)

    timeout_s = assistant.config.limits.request_timeout_s
    parts_of_body |= add_embedding_route(app, assistant.embed, timeout_s)
    if assistant.files:
        add_file_routes(app, assistant.files, timeout_s)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Json:
        """List the models that are served."""
        return {"object": "list", "data": assistant.models(caller_of(request))}

    @app.get("/v1/models/{model:path}", response_model=None)
    async def get_model(request: Request, model: str) -> Json | Response:
        """Describe one model."""
        found = [entry for entry in assistant.models(caller_of(request)) if entry["id"] == model]
        if found:
            return found[0]
        return error_response(failure_of(ModelNotFound("this model does not exist", "model"), request))

    @app.get("/health", summary="Healthz, as vLLM calls it")
    @app.get("/healthz")
    async def healthz() -> Json:
        """Say that requests are taken."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        """Ask every part for a real answer."""
        return await assistant.ready()

    add_audio_routes(app, assistant.speech)

    add_metrics_route(app)
    answer_unknown_paths(app)  # after all other routes
    describe(app, parts_of_body)
    return app
