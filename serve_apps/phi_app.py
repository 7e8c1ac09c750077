"""The LM as a deployment: a conversation and its features -> streamed text.

In: `Message`s in which speech is already text, and one array of features for all images. Out: a stream of
`EngineChunk`s. Renders with the renderer of training, embeds, and leaves decoding to an engine. Does not know
HTTP, image files or sound.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mmllm_core.bundle import Bundle
from mmllm_core.conversation import IMAGE_TOKEN_ID, render
from mmllm_core.engine.grammar import token_bytes
from mmllm_core.engine.protocol import EngineChunk, EngineLoad, EngineRequest
from serve_apps.config import PhiConfig
from serve_apps.metrics import gauge
from serve_apps.observability_config import ObservabilityConfig
from serve_apps.phi_engine import start_engine
from serve_apps.prompt import Prompt
from serve_apps.tracing import Trace, start_tracing
from serve_apps.work_in_flight import WorkInFlight


class PhiDeployment:
    """Runs the LM of a bundle, with its adapter and connector.

    Raises:
        BundleError, WeightsError: the bundle cannot be opened, which ends the replica's start.
        ConfigError, ExportError, EngineError: as `start_engine`.
    """

    def __init__(self, bundle: Path, config: PhiConfig, observability: ObservabilityConfig = ObservabilityConfig()):
        opened = Bundle.open(bundle)
        self._device = config.device
        self._work, self._kv_use = WorkInFlight("text", "tokens"), gauge("mmllm_kv_use")
        self._tracer = start_tracing(observability, "text")
        self._stream_interval_s = config.stream_interval_s
        self._context_length = opened.profile.language.context_length
        self._tokenizer = opened.tokenizer
        torch.set_num_threads(config.n_threads)
        with ThreadPoolExecutor(1) as starting:  # its team of threads ends with it: the engine's shall be the only one
            self._model, self._engine = starting.submit(start_engine, opened, config).result()
        torch.set_num_threads(1)  # of the threads that embed prompts
        self._kv_use.set(0.0)
        self._n_image_tokens = self._model.connector.n_tokens(opened.info.n_patches)

    async def generate(self, prompt: Prompt) -> AsyncGenerator[EngineChunk, None]:
        """Answer a prompt. Closing the stream, as a disconnect does, ends the request in the engine.

        Raises:
            ConversationError: the conversation cannot be rendered or does not fit the context.
            SchemaError: no answer can be bound to its JSON schema.
            DeadlineError: its time is up.
            EngineError: the engine failed.
        """
        deadline = None if prompt.seconds is None else time.monotonic() + prompt.seconds
        trace = Trace(self._tracer, prompt.traceparent)
        with self._work.request() as work, trace.span("generate") as (span, _):
            request = replace(await asyncio.to_thread(self._request, prompt), deadline=deadline)
            work.amount = request.prompt_tokens
            span.set_attribute("mmllm.prompt_tokens", request.prompt_tokens)
            async with aclosing(coalesce(self._engine.generate(request), self._stream_interval_s)) as chunks:
                async for chunk in chunks:
                    if not work.begun:
                        span.add_event("first token")
                    self._work.begin(work)
                    work.amount += len(chunk.token_ids)
                    self._kv_use.set(self._engine.load().kv_use)
                    yield chunk

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for the tokens of prompts and answers, waiting ones too, and the use of their memory."""
        kv_use = self._engine.load().kv_use
        self._kv_use.set(kv_use)
        return self._work.stats() | {"kv_use": kv_use}

    def vocabulary(self) -> list[bytes]:
        """What each token stands for, by its id; a token may be a part of a character."""
        return token_bytes(self._tokenizer)

    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        return self._engine.load()

    def check_health(self) -> None:
        """Ask the engine; Serve replaces a replica whose engine is down.

        Raises:
            EngineError: the engine cannot serve any more.
        """
        self._engine.health()

    @torch.inference_mode()
    def _request(self, prompt: Prompt) -> EngineRequest:
        """Render and embed a prompt."""
        rendered = render(
            prompt.messages,
            self._tokenizer,
            n_image_tokens=self._n_image_tokens,
            max_length=self._context_length - 1,  # an answer has at least one token
            generation_prompt=True,
        )
        input_ids = torch.tensor([rendered.input_ids], device=self._device)  # (1, t)
        features = None
        if prompt.features is not None:
            features = torch.from_numpy(prompt.features.astype(np.float32)).to(self._device)
        return EngineRequest(
            prompt.id,
            self._model.embed(input_ids, features)[0],  # (t, d_model)
            prompt.sampling,
            self._model.media(input_ids, features),
            content=content_of(rendered.input_ids, prompt.features, self._n_image_tokens),
        )


def content_of(input_ids: Sequence[int], features: NDArray[np.float16] | None, n_image_tokens: int) -> tuple[int, ...]:
    """What stands at each position of a prompt: token ids, and negative numbers that name an image's content.

    Args:
        input_ids: images as runs of `n_image_tokens` times `IMAGE_TOKEN_ID`.
        features: (n_images, n, d_vision) in order of appearance.
    """
    parts: list[int] = []
    for image in () if features is None else features:
        digest = int.from_bytes(blake2b(np.ascontiguousarray(image).tobytes(), digest_size=7).digest())
        parts += [-1 - digest - i for i in range(n_image_tokens)]
    of_images = iter(parts)
    return tuple(next(of_images) if token == IMAGE_TOKEN_ID else token for token in input_ids)


async def coalesce(chunks: AsyncIterator[EngineChunk], interval_s: float) -> AsyncGenerator[EngineChunk, None]:
    """Send the first chunk alone and at once, and then whatever came within `interval_s` as one.

    Every item that crosses processes costs about as much as a token of a small model takes; a reader does not
    notice the interval. Closing this generator closes `chunks`.
    """
    loop = asyncio.get_running_loop()
    held: list[EngineChunk] = []
    due = loop.time()
    coming = asyncio.ensure_future(_next(chunks))
    try:
        while True:
            wait_s = max(0.0, due - loop.time()) if held else None
            await asyncio.wait({coming}, timeout=wait_s)
            if coming.done():
                if coming.exception() is not None or (chunk := coming.result()) is None:
                    break
                held.append(chunk)
                coming = asyncio.ensure_future(_next(chunks))
            if held and loop.time() >= due:
                for merged in _merged(held):
                    yield merged
                held, due = [], loop.time() + interval_s
        for merged in _merged(held):
            yield merged
        coming.result()  # raises what ended the stream, after what had come before it
    finally:
        coming.cancel()
        await asyncio.wait({coming})
        await chunks.aclose()  # type: ignore[attr-defined]


async def _next(chunks: AsyncIterator[EngineChunk]) -> EngineChunk | None:
    return await anext(chunks, None)


def _merged(chunks: Sequence[EngineChunk]) -> list[EngineChunk]:
    """One chunk of each answer."""
    by_answer: dict[int, list[EngineChunk]] = {}
    for chunk in chunks:
        by_answer.setdefault(chunk.index, []).append(chunk)
    return [
        replace(
            parts[-1],
            text="".join(part.text for part in parts),
            token_ids=tuple(token for part in parts for token in part.token_ids),
            logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
        )
        for parts in by_answer.values()
    ]
