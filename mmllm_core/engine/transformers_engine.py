"""The embedded engine: any Hugging Face causal LM, on CPU or GPU.

In: prompts in embeddings or tokens. Out: streamed text. One thread owns the model and advances all running sequences at
once, a step at a time (continuous batching: Orca, Yu et al., OSDI 2022): those that decode by a token each, and prompts
by as much as the step has room for, so that a long prompt keeps nobody waiting (chunked prefill: Sarathi, Agrawal et
al., 2023, arXiv:2308.16369). A sequence starts when there are pages for all that it may take, so memory cannot run out
midway. Does not know images, HTTP or Ray.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm_core.engine.call import Call, Item, positions, send_all
from mmllm_core.engine.grammar import Grammars
from mmllm_core.engine.line_media import LineMedia
from mmllm_core.engine.lora import LineAdapters
from mmllm_core.engine.page_pool import PagePool
from mmllm_core.engine.paged_attention import PAGE, StepLayout, page_bytes
from mmllm_core.engine.protocol import EngineChunk, EngineLoad, EngineRequest
from mmllm_core.engine.sampler import choose
from mmllm_core.engine.sequence import Sequence
from mmllm_core.engine.step import kv_shape, step_of
from mmllm_core.errors import DeadlineError, EngineError
from mmllm_core.language import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.connectors import Media

_log = logging.getLogger(__name__)


class TransformersEngine:
    """Implements `mmllm_core.engine.protocol.Engine`.

    Args:
        lm: the causal LM, plain or wrapped by peft; used from one thread only, and by this engine alone.
        tokenizer: its tokenizer.
        context_length: most positions that prompt and answer may take together.
        showing: lets the LM's layers look at media within a block (`MultimodalLM.showing`).
        kv_cache_bytes: memory for keys and values, taken at once.
        max_sequences: that run at a time.
        step_tokens: positions of a step; prompts are computed so many at a time, less what decodes.
        takes_adapters: whether requests may each have an adapter of their own; the LM is then plain, or quantized.
        n_threads: CPU threads of a step; as many as torch has if None. They are fast only while no other thread of the
            process has a team of its own: where there are more threads than CPUs, libgomp lets those that wait sleep,
            and every product waits until they are awake again.

    Raises:
        ConfigError: the LM's positions cannot be counted as far as the context goes.
        EngineError: `kv_cache_bytes` do not hold a page.
    """

    def __init__(
        self,
        lm: Any,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context_length: int,
        showing: "Callable[[Media | None], AbstractContextManager[object]]" = contextlib.nullcontext,
        kv_cache_bytes: int = 1_000_000_000,
        max_sequences: int = 64,
        step_tokens: int = 256,
        takes_adapters: bool = False,
        n_threads: int | None = None,
    ):
        self._lm = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        self._showing = showing
        self._tokenizer = tokenizer
        self._embed = self._lm.get_input_embeddings()
        self._device = self._embed.weight.device
        self._stop_ids = stop_token_ids(lm, tokenizer)
        self._grammars = Grammars(tokenizer, self._lm.config.vocab_size, self._stop_ids)
        n_pages = kv_cache_bytes // page_bytes(*kv_shape(self._lm.config), self._embed.weight.dtype)
        if n_pages < 1:
            raise EngineError(f"kv_cache_bytes: {kv_cache_bytes} do not hold a page of keys and values: raise it")
        self._pool = PagePool(min(n_pages, max_sequences * -(-context_length // PAGE)))
        self._context_length = context_length
        self._capacity = self._pool.n_pages * PAGE
        self._max_sequences = max_sequences
        self._step_tokens = step_tokens
        self._adapters = LineAdapters() if takes_adapters else None
        self._step = step_of(self._lm, self._pool.n_pages, context_length, self._adapters)
        self._media = LineMedia()
        self._incoming: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._calls: dict[int, Call] = {}
        """By their own identity: two may have one id."""
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._failure: BaseException | None = None
        self._ended = False
        started = threading.Event()
        threads = n_threads or torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, args=(threads, started), name="engine", daemon=True)
        self._thread.start()
        started.wait()

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineChunk]:
        """As `Engine.generate`."""
        self.health()
        if request.adapter is not None and self._adapters is None:
            raise EngineError(f"request {request.id} has an adapter, and the engine was started without them")
        limit = positions(request, self._context_length, self._capacity)
        rope, shares = self._step.rope_of(limit), self._step.shares_prefixes
        schema = request.sampling.json_schema
        grammar = None if schema is None else await asyncio.to_thread(self._grammars.compile, schema)
        call = Call(request, asyncio.get_running_loop(), grammar)
        self._calls[id(call)] = call
        try:
            first: Sequence | None = None
            for index in range(request.sampling.n):
                sequence = Sequence(call, index, limit, self._tokenizer, self._stop_ids, first, rope, shares)
                first = first or sequence
                self._incoming.put(sequence)
            if self._ended:  # the thread saw `_calls` before or will never see this one
                self.health()
            async for chunk in call.answers():
                yield chunk
        finally:
            call.aborted = True
            self._calls.pop(id(call), None)

    def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        for call in list(self._calls.values()):
            if call.request.id == request_id:
                call.aborted = True

    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        calls = list(self._calls.values())
        running = [s for s in list(self._running) if not s.call.aborted]  # others end with the next step
        known = sum(call.request.sampling.n for call in calls if not call.aborted)
        tokens = sum(s.prompt_tokens + len(s.token_ids) for s in running)
        return EngineLoad(max(0, known - len(running)), len(running), tokens, self._pool.n_held / self._pool.n_pages)

    def health(self) -> None:
        """Raise `EngineError` if the engine's thread has ended."""
        if self._ended:
            raise EngineError(f"the engine is down: {self._failure or 'it was shut down'}")

    def shutdown(self) -> None:
        """End all requests and the engine's thread."""
        self._incoming.put(None)
        self._thread.join(timeout=30)

    @torch.inference_mode()
    def _run(self, n_threads: int, started: threading.Event) -> None:
        torch.set_num_threads(n_threads)  # of this thread, and of those that begin later
        started.set()
        try:
            while self._receive(block=not self._running and not self._waiting):
                sent: list[tuple[Call, Item]] = []
                self._drop(sent)
                self._admit(sent)
                if self._running:
                    self._advance(sent)
                send_all(sent)
            self._ended = True
            while not self._incoming.empty():
                self._receive(block=False)
            send_all([(s.call, s.finish("abort")) for s in (*self._running, *self._waiting)])
        except BaseException as error:  # the thread's last words: health() and waiting callers repeat them
            self._failure = error
            self._ended = True
            _log.exception("the engine's thread died")
            send_all([(call, EngineError(f"the engine died: {error}")) for call in list(self._calls.values())])
        self._running, self._waiting = [], deque()

    def _receive(self, *, block: bool) -> bool:
        """Take what has arrived; False if the engine shall end."""
        with contextlib.suppress(queue.Empty):
            while True:
                sequence = self._incoming.get(block=block)
                if sequence is None:
                    return False
                self._waiting.append(sequence)
                block = False
        return True

    def _drop(self, sent: list[tuple[Call, Item]]) -> None:
        """End sequences that nobody waits for any more, or whose time is up."""
        for sequence in [*self._running, *self._waiting]:
            if sequence.call.aborted:
                sent.append((sequence.call, sequence.finish("abort")))
            elif sequence.call.late:
                self._fail(sequence, DeadlineError("the request's time is up"), sent)
        self._waiting = deque(s for s in self._waiting if not s.finished)
        self._retire()

    def _admit(self, sent: list[tuple[Call, Item]]) -> None:
        """Let sequences run, in the order in which they came, as long as there is room."""
        held_up: deque[Sequence] = deque()
        while self._waiting and len(self._running) < self._max_sequences:
            sequence = self._waiting.popleft()
            if not sequence.ready:
                held_up.append(sequence)
                continue
            if not sequence.admit(self._pool):
                held_up.append(sequence)
                break
            try:
                sequence.embeddings = self._prompt(sequence.call.request)
            except Exception as error:
                self._fail(sequence, error, sent)
            self._running.append(sequence)
        self._waiting.extendleft(reversed(held_up))
        self._retire()

    def _prompt(self, request: EngineRequest) -> Tensor:
        """Embeddings (t, d_model) of a prompt."""
        if request.embeddings is None:
            embeddings: Tensor = self._embed(torch.tensor(request.token_ids, device=self._device))
            return embeddings
        if request.embeddings.shape[1:] != self._embed.weight.shape[1:]:
            raise EngineError(
                f"embeddings of shape {tuple(request.embeddings.shape)} for an LM {self._embed.weight.shape[1]} wide"
            )
        return request.embeddings.to(self._device, self._embed.weight.dtype)

    def _advance(self, sent: list[tuple[Call, Item]]) -> None:
        """One step for all; where that fails, one for each alone, so that a failure is its own."""
        plan = self._plan()
        try:
            self._compute(plan, sent)
        except Exception as error:
            if len(plan) > 1:
                _log.warning("a step of %d sequences failed (%s): trying each alone", len(plan), error)
            for sequence, n in plan:
                if sequence.finished:
                    continue
                try:
                    self._compute([(sequence, n)], sent)
                except Exception as own:
                    _log.exception("request %s failed", sequence.call.request.id)
                    self._fail(sequence, own, sent)
        self._retire()

    def _plan(self) -> list[tuple[Sequence, int]]:
        """Which sequences take part in a step, and with how many positions; those that decode come first."""
        plan = [(s, 1) for s in self._running if s.decoding]
        room = max(1, self._step_tokens - len(plan))
        for sequence in self._running:
            if not sequence.decoding and room > 0:
                n = min(room, sequence.prompt_tokens - sequence.n_computed)
                plan.append((sequence, n))
                room -= n
        return plan

    def _compute(self, plan: list[tuple[Sequence, int]], sent: list[tuple[Call, Item]]) -> None:
        decoding = [s for s, _ in plan if s.decoding]
        prompts = [(s, n) for s, n in plan if not s.decoding]
        layout = StepLayout.of(
            [(s.pages, s.n_computed) for s in decoding],
            [(s.pages, s.n_computed, n, s.n_computed + n == s.prompt_tokens) for s, n in prompts],
            self._device,
        )
        line = [s.embeddings[s.n_computed : s.n_computed + n] for s, n in prompts if s.embeddings is not None]
        if decoding:
            line.insert(0, self._embed(torch.tensor([s.token_ids[-1] for s in decoding], device=self._device)))
        if self._adapters is not None:
            self._adapters.set([(s.call.request.adapter, n) for s, n in plan], self._device)
        media = self._media.of([(s.call.request.media, s.n_computed, n) for s, n in plan])
        with self._showing(media):
            logits = self._step(torch.cat(line), layout, [s.rope for s, _ in plan])  # (n_last, vocab)
        for sequence, n in plan:
            sequence.computed(n, self._pool)
        chosen = [s for s, _ in plan if s.decoding]
        for sequence, choice in zip(chosen, choose(logits, [s.sampling for s in chosen]), strict=True):
            if choice is None:
                self._fail(sequence, EngineError("the LM gave a logit that is not finite"), sent)
                continue
            sequence.embeddings = None
            if chunk := sequence.take(choice):
                sent.append((sequence.call, chunk))

    def _fail(self, sequence: Sequence, error: BaseException, sent: list[tuple[Call, Item]]) -> None:
        sequence.finished = True
        sequence.call.aborted = True
        sent.append((sequence.call, error))

    def _retire(self) -> None:
        for sequence in self._running:
            if sequence.finished:
                self._step.release(sequence.pages[0])
                sequence.release(self._pool)
        self._running = [s for s in self._running if not s.finished]
