"""The embedded engine: any Hugging Face causal LM on CPU or GPU.

In: prompt embeddings. Out: streamed text. One thread owns the model and advances every running sequence by a
token in turn, so a long answer never keeps a short one waiting. Sequences are not batched into one forward.
Does not know images, HTTP or Ray.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm_core.engine.protocol import EngineChunk, EngineLoad, EngineRequest, FinishReason
from mmllm_core.engine.text_stream import TextStream
from mmllm_core.errors import ConversationError, EngineError
from mmllm_core.language import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.connectors import Media

_log = logging.getLogger(__name__)


class TransformersEngine:
    """Implements `mmllm_core.engine.protocol.Engine`.

    Args:
        lm: the causal LM, plain or wrapped by peft; used from one thread only.
        tokenizer: its tokenizer.
        context_length: most positions that prompt and answer may take together.
        showing: lets the LM's layers look at a request's media within a block (`MultimodalLM.showing`).
    """

    def __init__(
        self,
        lm: Any,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context_length: int,
        showing: "Callable[[Media | None], AbstractContextManager[object]]" = contextlib.nullcontext,
    ):
        self._lm = lm
        self._showing = showing
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._stop_ids = stop_token_ids(lm, tokenizer)
        self._incoming: queue.SimpleQueue[_Sequence | None] = queue.SimpleQueue()
        self._sequences: dict[str, _Sequence] = {}
        self._failure: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineChunk]:
        """Stream a completion. Closing the iterator aborts the request.

        Raises:
            ConversationError: prompt and `max_tokens` do not fit the context.
            EngineError: the engine failed on this request or is down.
        """
        self.health()
        prompt_tokens = request.embeddings.shape[0]
        if prompt_tokens + 1 > self._context_length:
            raise ConversationError(
                f"the prompt takes {prompt_tokens} tokens and the context holds {self._context_length}: shorten it",
                "messages",
            )
        sequence = _Sequence(request, asyncio.get_running_loop(), TextStream(self._tokenizer, request.sampling.stop))
        self._sequences[request.id] = sequence
        try:
            self._incoming.put(sequence)
            if self._ended:  # the thread saw `_sequences` before or will never see this one
                self.health()
            while True:
                item = await sequence.chunks.get()
                if isinstance(item, BaseException):
                    raise EngineError(f"generation failed: {item}") from item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            sequence.aborted = True
            if self._sequences.get(request.id) is sequence:
                del self._sequences[request.id]

    def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        if sequence := self._sequences.get(request_id):
            sequence.aborted = True

    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        sequences = list(self._sequences.values())
        running = [s for s in sequences if s.cache is not None]
        tokens = sum(s.request.embeddings.shape[0] + len(s.token_ids) for s in running)
        return EngineLoad(waiting=len(sequences) - len(running), running=len(running), tokens_in_flight=tokens)

    def health(self) -> None:
        """Raise `EngineError` if the engine's thread has ended."""
        if self._ended:
            raise EngineError(f"the engine is down: {self._failure or 'it was shut down'}")

    def shutdown(self) -> None:
        """End all requests and the engine's thread."""
        for sequence in list(self._sequences.values()):
            sequence.aborted = True
        self._incoming.put(None)
        self._thread.join(timeout=30)

    @torch.inference_mode()
    def _run(self) -> None:
        running: list[_Sequence] = []
        try:
            while True:
                arrived = self._arrivals(block=not running)
                running += [s for s in arrived if s is not None]
                if None in arrived:
                    self._ended = True
                    for sequence in [*running, *list(self._sequences.values())]:
                        if not sequence.finished:
                            self._finish(sequence, "abort")
                    return
                for sequence in list(running):
                    self._advance(sequence)
                    if sequence.finished:
                        running.remove(sequence)
        except BaseException as error:  # the thread's last words: health() and waiting callers repeat them
            self._failure = error
            self._ended = True
            _log.exception("the engine's thread died")
            for sequence in list(self._sequences.values()):
                sequence.send(error)

    def _arrivals(self, *, block: bool) -> list["_Sequence | None"]:
        arrived = [self._incoming.get()] if block else []
        with contextlib.suppress(queue.Empty):
            while True:
                arrived.append(self._incoming.get_nowait())
        return arrived

    def _advance(self, sequence: "_Sequence") -> None:
        """One token more for one sequence; its failure is its own."""
        try:
            if sequence.aborted:
                self._finish(sequence, "abort")
                return
            token = sequence.choose(self._forward(sequence))
            if token in self._stop_ids:
                self._finish(sequence, "stop", sequence.text.flush())
                return
            sequence.token_ids.append(token)
            text = sequence.text.push(token)
            if sequence.text.stopped:
                self._finish(sequence, "stop", text)
            elif self._is_full(sequence):
                self._finish(sequence, "length", text + sequence.text.flush())
            elif text:
                sequence.send(sequence.chunk(text, None))
        except Exception as error:
            _log.exception("request %s failed", sequence.request.id)
            sequence.finished = True
            sequence.cache = None
            sequence.send(error)

    def _forward(self, sequence: "_Sequence") -> Tensor:
        """Logits (vocab,) of the next token."""
        if sequence.cache is None:
            inputs = {"inputs_embeds": sequence.request.embeddings.unsqueeze(0)}  # (1, t, d_model)
        else:
            inputs = {"input_ids": torch.tensor([[sequence.token_ids[-1]]], device=self._lm.device)}
        with self._showing(sequence.request.media):
            output = self._lm(**inputs, past_key_values=sequence.cache, use_cache=True, logits_to_keep=1)
        sequence.cache = output.past_key_values
        return output.logits[0, -1].float()

    def _is_full(self, sequence: "_Sequence") -> bool:
        used = sequence.request.embeddings.shape[0] + len(sequence.token_ids)
        return len(sequence.token_ids) >= sequence.request.sampling.max_tokens or used >= self._context_length

    def _finish(self, sequence: "_Sequence", reason: FinishReason, text: str = "") -> None:
        sequence.finished = True
        sequence.cache = None
        sequence.send(sequence.chunk(text, reason))


@dataclass(eq=False)
class _Sequence:
    """A request on its way."""

    request: EngineRequest
    loop: asyncio.AbstractEventLoop
    text: TextStream
    chunks: asyncio.Queue[EngineChunk | BaseException] = field(default_factory=asyncio.Queue)
    token_ids: list[int] = field(default_factory=list)
    cache: Any = None
    sent: int = 0
    aborted: bool = False
    finished: bool = False
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        seed = self.request.sampling.seed
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed % 2**63)

    def choose(self, logits: Tensor) -> int:
        """Next token id from logits (vocab,): greedy at temperature 0, else nucleus sampling on the CPU,
        where the generator lives (arXiv:1904.09751)."""
        sampling = self.request.sampling
        if sampling.temperature <= 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.cpu() / sampling.temperature, dim=-1)
        ordered, ids = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0.0
        return int(ids[torch.multinomial(ordered, 1, generator=self.generator)])

    def chunk(self, text: str, reason: FinishReason | None) -> EngineChunk:
        """What became certain since the last chunk."""
        new_ids = tuple(self.token_ids[self.sent :])
        self.sent = len(self.token_ids)
        return EngineChunk(text, new_ids, self.request.embeddings.shape[0], len(self.token_ids), reason)

    def send(self, item: EngineChunk | BaseException) -> None:
        """Hand an item to the caller's event loop, which may be gone."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.chunks.put_nowait, item)
