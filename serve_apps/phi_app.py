"""The LM as a deployment: a conversation and its features -> streamed text.

In: `Message`s in which speech is already text, and one array of features for all images. Out: a stream of
`EngineChunk`s. Renders with the renderer of training, embeds, and leaves decoding to an engine. Does not know
HTTP, image files or sound. PyTorch comes with the replica: what composes deployments knows this class too.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmllm_core.config import parse_config
from mmllm_core.conversation import IMAGE_TOKEN_ID, render
from mmllm_core.engine.protocol import EngineChunk, EngineLoad, EngineRequest
from serve_apps.config import PhiConfig
from serve_apps.metrics import gauge
from serve_apps.observability_config import ObservabilityConfig
from serve_apps.prompt import Prompt
from serve_apps.served_bundles import Base, ServedBundle, ServedBundles
from serve_apps.tracing import Trace, start_tracing
from serve_apps.work_in_flight import WorkInFlight

if TYPE_CHECKING:
    from serve_apps.voices import Voice

_log = logging.getLogger("ray.serve")


class PhiDeployment:
    """Runs the LM of a bundle, with its adapter and connector.

    Args:
        bundles: by model name; the first is loaded as the replica starts.

    Raises:
        BundleError, WeightsError: the bundle cannot be opened, which ends the replica's start.
        ConfigError, ExportError, EngineError: as `start_engine`.
    """

    def __init__(
        self,
        bundles: Mapping[str, ServedBundle],
        config: PhiConfig,
        observability: ObservabilityConfig = ObservabilityConfig(),
    ):
        from serve_apps.voices import Voices

        opened = next(iter(bundles.values())).open()
        self._device = config.device
        self._work, self._kv_use = WorkInFlight("text", "tokens"), gauge("mmllm_kv_use")
        self._tracer = start_tracing(observability, "text")
        self._stream_intervals_s = config.stream_interval_s, config.stream_interval_most_s
        self._context_length = opened.profile.language.context_length
        self._tokenizer = opened.tokenizer
        self._voices = Voices(opened, bundles, config)
        self._kv_use.set(0.0)

    async def reconfigure(self, wanted: dict[str, Any]) -> None:
        """Take Serve's `user_config`, a `ServedBundles`: let other bundles answer, while what is on its way goes on.

        A bundle that cannot be loaded leaves those that answer in place and is logged: were it raised, Serve would
        replace the replica by one that cannot start.
        """
        try:
            await self._voices.change(parse_config(ServedBundles, wanted, "user_config").bundles)
        except Exception:
            _log.exception("the bundles that are served stay as they were")

    def served(self) -> dict[str, ServedBundle]:
        """The bundles that answer now, by model name."""
        return self._voices.bundles

    async def generate(self, prompt: Prompt) -> AsyncGenerator[EngineChunk, None]:
        """Answer a prompt. Closing the stream, as a disconnect does, ends the request in the engine.

        Raises:
            ConversationError: the conversation cannot be rendered or does not fit the context.
            SchemaError: no answer can be bound to its JSON schema.
            DeadlineError: its time is up.
            EngineError: the engine failed.
        """
        deadline = None if prompt.seconds is None else time.monotonic() + prompt.seconds
        with (
            self._work.request() as work,
            Trace(self._tracer, prompt.traceparent).span("generate") as (span, _),
            (await self._voices.of(prompt.model)).used() as voice,
        ):
            request = replace(await asyncio.to_thread(self._request, prompt, voice), deadline=deadline)
            work.amount = request.prompt_tokens
            span.set_attribute("mmllm.prompt_tokens", request.prompt_tokens)
            async with aclosing(coalesce(voice.engine.generate(request), self._stream_interval_s)) as chunks:
                async for chunk in chunks:
                    if not work.begun:
                        span.add_event("first token")
                    self._work.begin(work)
                    self._kv_use.set(self._voices.load().kv_use)
                    work.amount += len(chunk.token_ids)
                    yield chunk

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for the tokens of prompts and answers, waiting ones too, and the use of their memory."""
        kv_use = self._voices.load().kv_use
        self._kv_use.set(kv_use)
        return self._work.stats() | {"kv_use": kv_use}

    def base(self) -> Base:
        """What another bundle must share with those that are served."""
        return self._voices.base

    def vocabulary(self) -> list[bytes]:
        """What each token stands for, by its id; a token may be a part of a character."""
        from mmllm_core.engine.grammar import token_bytes

        return token_bytes(self._tokenizer)

    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        return self._voices.load()

    def shutdown(self) -> None:
        """End the engines, and what they still answer."""
        self._voices.shutdown()

    def check_health(self) -> None:
        """Ask the engine; Serve replaces a replica whose engine is down.

        Raises:
            EngineError: the engine cannot serve any more.
        """
        self._voices.health()

    def _stream_interval_s(self) -> float:
        """How long text waits for more of it, by how many answers are computed now."""
        least, most = self._stream_intervals_s
        return max(least, min(most, least * self._voices.load().running / 4))

    def _request(self, prompt: Prompt, voice: "Voice") -> EngineRequest:
        """Render and embed a prompt."""
        import torch

        rendered = render(
            prompt.messages,
            self._tokenizer,
            n_image_tokens=voice.n_image_tokens,
            max_length=self._context_length - 1,  # an answer has at least one token
            generation_prompt=True,
        )
        input_ids = torch.tensor([rendered.input_ids], device=self._device)  # (1, t)
        features = None
        if prompt.features is not None:
            features = torch.from_numpy(prompt.features.astype(np.float32)).to(self._device)
        with torch.inference_mode():
            embeddings = voice.model.embed(input_ids, features)[0]  # (t, d_model)
            media = voice.model.media(input_ids, features)
        return EngineRequest(
            prompt.id,
            embeddings,
            prompt.sampling,
            media,
            content=content_of(rendered.input_ids, prompt.features, voice.n_image_tokens),
            adapter=voice.adapter,
            namespace=voice.namespace,
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


async def coalesce(
    chunks: AsyncIterator[EngineChunk], interval_s: Callable[[], float]
) -> AsyncGenerator[EngineChunk, None]:
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
                held, due = [], loop.time() + interval_s()
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
