"""The LM as a deployment: a conversation and its features -> streamed text.

In: `Message`s in which speech is already text, and one array of features for all images. Out: a stream of
`EngineChunk`s. Renders with the renderer of training, embeds, and leaves decoding to an engine. Does not know
HTTP, image files or sound.
"""

import asyncio
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
from mmllm_core.engine.protocol import Engine, EngineChunk, EngineLoad, EngineRequest
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.merging import merge_adapter
from mmllm_core.model import MultimodalLM
from serve_apps.config import PhiConfig
from serve_apps.prompt import Prompt
from serve_apps.work_in_flight import WorkInFlight


class PhiDeployment:
    """Runs the LM of a bundle, with its adapter and connector.

    Raises:
        BundleError, WeightsError: the bundle cannot be opened, which ends the replica's start.
        ExportError: its adapter cannot be merged, as `config.merged` asks.
    """

    def __init__(self, bundle: Path, config: PhiConfig):
        opened = Bundle.open(bundle)
        self._device = config.device
        self._work = WorkInFlight("text", "tokens")
        self._stream_interval_s = config.stream_interval_s
        self._context_length = opened.profile.language.context_length
        self._tokenizer = opened.tokenizer
        torch.set_num_threads(config.n_threads)
        with ThreadPoolExecutor(1) as starting:  # its team of threads ends with it: the engine's shall be the only one
            self._model, self._engine = starting.submit(_start, opened, config).result()
        torch.set_num_threads(1)  # of the threads that embed prompts
        self._n_image_tokens = self._model.connector.n_tokens(opened.info.n_patches)

    async def generate(self, prompt: Prompt) -> AsyncGenerator[EngineChunk, None]:
        """Answer a prompt. Closing the stream, as a disconnect does, ends the request in the engine.

        Raises:
            ConversationError: the conversation cannot be rendered or does not fit the context.
            EngineError: the engine failed.
        """
        with self._work.request() as work:
            request = await asyncio.to_thread(self._request, prompt)
            work.amount = request.prompt_tokens
            async with aclosing(coalesce(self._engine.generate(request), self._stream_interval_s)) as chunks:
                async for chunk in chunks:
                    work.amount += len(chunk.token_ids)
                    yield chunk

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for the tokens of prompts and answers, waiting ones too, and the use of their memory."""
        return self._work.stats() | {"kv_use": self._engine.load().kv_use}

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


def _start(bundle: Bundle, config: PhiConfig) -> tuple[MultimodalLM, Engine]:
    model = bundle.load_model(config.device)
    if config.merged:
        dtype = model.causal_lm.get_input_embeddings().weight.dtype
        model.lm = merge_adapter(model.lm, dtype)
    engine = TransformersEngine(
        model.lm,
        bundle.tokenizer,
        context_length=bundle.profile.language.context_length,
        showing=model.showing,
        kv_cache_bytes=config.kv_cache_bytes,
        max_sequences=config.max_ongoing_requests,
        step_tokens=config.step_tokens,
        n_threads=config.n_threads,
    )
    return model, engine


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
                yield _merged(held)
                held, due = [], loop.time() + interval_s
        if held:
            yield _merged(held)
        coming.result()  # raises what ended the stream, after what had come before it
    finally:
        coming.cancel()
        await asyncio.wait({coming})
        await chunks.aclose()  # type: ignore[attr-defined]


async def _next(chunks: AsyncIterator[EngineChunk]) -> EngineChunk | None:
    return await anext(chunks, None)


def _merged(chunks: Sequence[EngineChunk]) -> EngineChunk:
    last = chunks[-1]
    return replace(
        last,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
    )
