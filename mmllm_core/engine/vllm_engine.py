"""vLLM as an engine (Kwon et al., 2023, arXiv:2309.06180): for GPUs, and wherever its kernels are the fastest.

In: prompts in embeddings or tokens. Out: streamed text. vLLM schedules, computes and samples, in a process of its own;
text is made of its tokens here, by the same rules as `TransformersEngine` has. Prompts are always sent as embeddings,
and prefixes are not cached: vLLM mixes prompts up when some come as tokens or share what they begin with
(vllm-project/vllm#56655). Does not know images, HTTP or Ray.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor

from mmllm_core.config import VllmConfig
from mmllm_core.engine.call import Call, positions
from mmllm_core.engine.grammar import Grammars
from mmllm_core.engine.protocol import EngineChunk, EngineLoad, EngineRequest
from mmllm_core.engine.sequence import Sequence
from mmllm_core.engine.vllm_adapters import VllmAdapters
from mmllm_core.engine.vllm_request import prompt_of, sampling_of, taken
from mmllm_core.errors import ConfigError, DeadlineError, EngineError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUANTIZATION = {None: None, "nf4": "bitsandbytes", "awq": "awq", "fp8": "fp8"}


@dataclass
class _Running:
    """A call and what computes its answers."""

    call: Call
    sequences: list[Sequence] = field(default_factory=list)
    work: "list[Future[None]]" = field(default_factory=list)


class VllmEngine:
    """Implements `mmllm_core.engine.protocol.Engine`.

    Args:
        folder: of a causal LM as transformers saves it; a tokenizer in it is not looked at.
        tokenizer: the LM's tokenizer.
        embed: the LM's input embeddings: token ids (t,) -> (t, d_model).
        stop_ids: tokens that end an answer.
        context_length: most positions that prompt and answer may take together.
        dtype: that the LM is computed in.
        config: of vLLM.
        device: `cpu` or `cuda`.
        adapter: folder of a LoRA adapter, in peft's format, that is applied as vLLM computes.
        lora_rank: the largest rank of adapters that requests may have of their own; None if they have none.
        max_adapters: of those, how many are held at a time.
        kv_cache_bytes: memory for keys and values on a CPU; on GPUs it is what `config` leaves.
        max_sequences: that run at a time.
        step_tokens: positions of a step.

    Raises:
        ConfigError: vLLM is not installed, or cannot do what is asked of it here.
        EngineError: vLLM did not start.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        embed: Any,
        stop_ids: list[int],
        context_length: int,
        dtype: torch.dtype,
        config: VllmConfig,
        device: str = "cpu",
        adapter: Path | None = None,
        lora_rank: int | None = None,
        max_adapters: int = 8,
        kv_cache_bytes: int = 1_000_000_000,
        max_sequences: int = 64,
        step_tokens: int = 256,
    ):
        require_vllm(config, device)
        self._tokenizer = tokenizer
        self._embed = embed
        self._stop_ids = stop_ids
        self._context_length = context_length
        self._running: dict[int, _Running] = {}
        self._ended = False
        self._stats: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        settings: dict[str, Any] = {
            "model": str(folder),
            "dtype": str(dtype).removeprefix("torch."),
            "enable_prompt_embeds": True,
            "enable_prefix_caching": False,
            "max_model_len": context_length,
            "max_num_seqs": max_sequences,
            "max_num_batched_tokens": max(step_tokens, max_sequences),
            "tensor_parallel_size": config.tensor_parallel,
            "quantization": _QUANTIZATION[config.quantization],
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enforce_eager": config.enforce_eager or device == "cpu",
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        if device == "cpu":
            settings["kv_cache_memory_bytes"] = kv_cache_bytes
        self._adapters = VllmAdapters(adapter, lora_rank, max_adapters)
        settings |= self._adapters.settings
        try:
            with tempfile.TemporaryDirectory(prefix="mmllm-tokenizer-") as scratch:
                tokenizer.save_pretrained(scratch)  # vLLM reads it as it starts, with the LM's config beside it
                shutil.copy(folder / "config.json", scratch)
                self._llm = self._in_loop(self._start(settings | {"tokenizer": scratch})).result()
        except Exception as error:
            self.shutdown()
            raise EngineError(f"vLLM did not start: {first_line(error)}") from error
        vocab_size = self._llm.model_config.get_vocab_size()
        self._grammars = Grammars(tokenizer, vocab_size, stop_ids)

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineChunk]:
        """As `Engine.generate`."""
        self.health()
        if request.adapter is not None and not self._adapters.takes_own:
            raise EngineError(f"request {request.id} has an adapter, and the engine was started without them")
        limit = positions(request, self._context_length, self._context_length)
        if request.sampling.json_schema is not None:  # vLLM compiles it again; here it is refused by our own error
            await asyncio.to_thread(self._grammars.compile, request.sampling.json_schema)
            self.health()
        prompt = prompt_of(request, self._embedded(request), self._llm.model_config.get_vocab_size())
        call = Call(request, asyncio.get_running_loop())
        running = self._running[id(call)] = _Running(call)
        try:
            for index in range(request.sampling.n):
                sequence = Sequence(call, index, limit, self._tokenizer, self._stop_ids)
                running.sequences.append(sequence)
                work = self._in_loop(self._answer(sequence, prompt))
                work.add_done_callback(partial(_say_aborted, sequence))
                running.work.append(work)
            if self._ended:  # `shutdown` saw these answers, or its loop will never begin them
                self.health()
            async for chunk in call.answers():
                yield chunk
        finally:
            self._running.pop(id(call), None)
            call.aborted = True
            for work in running.work:
                work.cancel()

    def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        for running in list(self._running.values()):
            if running.call.request.id == request_id:
                running.call.aborted = True
                for work in running.work:
                    work.cancel()

    def load(self) -> EngineLoad:
        """How busy the engine is; how many run, and what they hold, is as of vLLM's last step."""
        sequences = [s for r in list(self._running.values()) if not r.call.aborted for s in r.sequences]
        unfinished = [s for s in sequences if not s.finished]
        running = min(len(unfinished), self._stats.num_running_reqs if self._stats else 0)
        tokens = sum(s.prompt_tokens + len(s.token_ids) for s in unfinished if s.token_ids)
        kv_use = self._stats.kv_cache_usage if self._stats and unfinished else 0.0
        return EngineLoad(len(unfinished) - running, running, tokens, kv_use)

    def health(self) -> None:
        """Raise `EngineError` if vLLM has ended."""
        if self._ended:
            raise EngineError("the engine is down: it was shut down")
        if self._llm.errored:
            raise EngineError(f"the engine is down: {first_line(self._llm.dead_error)}")

    def shutdown(self) -> None:
        """End all requests and vLLM's process."""
        if self._ended:
            return
        self._ended = True
        for running in list(self._running.values()):
            for work in running.work:
                work.cancel()
        if hasattr(self, "_llm"):
            self._in_loop(self._stop()).result(timeout=60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)

    def _in_loop(self, work: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _start(self, settings: dict[str, Any]) -> Any:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers what it runs on
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        engine = self

        class Stats(StatLoggerBase):  # type: ignore[misc]  # of a package without types
            """Keeps what the scheduler says of itself."""

            def __init__(self, vllm_config: Any, engine_index: int = 0):
                pass

            def record(self, scheduler_stats: Any, *others: Any, **more: Any) -> None:
                engine._stats = scheduler_stats or engine._stats

            def log_engine_initialized(self) -> None:
                pass

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings), stat_loggers=[Stats])

    async def _stop(self) -> None:
        await asyncio.sleep(0)  # cancelled answers end first
        self._llm.shutdown()

    def _embedded(self, request: EngineRequest) -> Tensor:
        """Embeddings (t, d_model) of a prompt, on the CPU.

        Raises:
            EngineError: vLLM would fail on them, or answer what was not asked: not of the LM's width, not finite, or
                of tokens that it does not have.
        """
        if request.media is not None:
            raise EngineError("vLLM's layers cannot look at images: serve cross-attention by the other engine")
        with torch.inference_mode():
            found = request.embeddings
            lm = self._llm.model_config
            if found is None:
                if unknown := [token for token in request.token_ids or () if not 0 <= token < lm.get_vocab_size()]:
                    raise EngineError(f"token {unknown[0]} for an LM that has {lm.get_vocab_size()}")
                found = self._embed(torch.tensor(request.token_ids, device=self._embed.weight.device))
            if found.dim() != 2 or found.shape[1] != lm.get_hidden_size():
                raise EngineError(f"embeddings of shape {tuple(found.shape)} for an LM {lm.get_hidden_size()} wide")
            found = found.detach().to("cpu", lm.dtype).clone()
            if not bool(found.isfinite().all()):
                raise EngineError("the prompt's embeddings are not finite")
            return found

    async def _answer(self, sequence: Sequence, prompt: dict[str, Any]) -> None:
        call = sequence.call
        request = call.request
        until, room = request.deadline, sequence.limit - sequence.prompt_tokens
        try:
            params = sampling_of(request.sampling, sequence.index, room, self._stop_ids)
            async with asyncio.timeout(None if until is None else max(0.0, until - time.monotonic())):
                outputs = self._llm.generate(
                    prompt, params, f"{request.id}-{uuid4().hex}", lora_request=self._adapters.of(request)
                )
                async with contextlib.aclosing(outputs):
                    async for output in outputs:
                        for chunk in taken(sequence, output.outputs[0]):
                            call.send(chunk)
                        if sequence.finished:
                            return
            call.send(EngineError("vLLM ended an answer without a reason"))
        except TimeoutError:
            call.send(DeadlineError("the request's time is up"))
        except Exception as error:
            call.send(EngineError(f"vLLM failed: {first_line(error)}"))


def require_vllm(config: VllmConfig, device: str) -> None:
    """Raise unless vLLM is there and can do what is asked of it.

    Raises:
        ConfigError: it is not installed, or `config` does not go with the device.
    """
    if find_spec("vllm") is None:
        raise ConfigError("engine: vllm, and vLLM is not installed: pip install 'mmllm[vllm]', or take transformers")
    if objection := config.objection(device):
        raise ConfigError(objection)
    gpus = torch.cuda.device_count()
    if device != "cpu" and config.tensor_parallel > gpus:
        raise ConfigError(f"vllm.tensor_parallel: {config.tensor_parallel} GPUs, and there are {gpus}: lower it")


def _say_aborted(sequence: Sequence, work: "Future[None]") -> None:
    if work.cancelled() and not sequence.finished:  # it may never have begun
        sequence.call.send(sequence.finish("abort"))
