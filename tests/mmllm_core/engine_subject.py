"""An engine of either kind beside the LM that it should answer as, and how tests ask it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from mmllm_core.engine.protocol import Engine, EngineChunk, EngineRequest, SamplingParams
from mmllm_core.extensions import extension_names

ENGINES = ["transformers", *(["vllm"] if find_spec("vllm") else []), *extension_names("mmllm.engines")]
"""Those that are installed: of other packages too, which keep the same promises."""
CONTEXT = 512
WIDER = {"hidden_size": 128, "intermediate_size": 160}
"""vLLM's attention on CPUs knows no heads of less than 32."""


@dataclass(frozen=True)
class Subject:
    """An engine, and the same LM for `generate`."""

    engine: Any
    plain: Any
    tokenizer: Any
    stop_ids: list[int]
    """That the LM and its tokenizer name."""

    def ending_with(self, *stop_ids: int) -> None:
        """Say which tokens end answers from now on. Every engine keeps them in `_stop_ids`."""
        self.engine._stop_ids = list(stop_ids)


Start = Callable[[str, Any, Any], Subject]


async def ask(engine: Engine, request: EngineRequest) -> list[EngineChunk]:
    return [chunk async for chunk in engine.generate(request)]


def of_tokens(id: str, ids: list[int], deadline: float | None = None, **sampling: Any) -> EngineRequest:
    return EngineRequest(id, token_ids=tuple(ids), sampling=SamplingParams(**sampling), deadline=deadline)


def complete(subject: Subject, ids: list[int], **sampling: Any) -> list[EngineChunk]:
    return asyncio.run(asyncio.wait_for(ask(subject.engine, of_tokens("a", ids, **sampling)), 120))


def together(subject: Subject, *requests: EngineRequest) -> list[Any]:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(ask(subject.engine, r) for r in requests), return_exceptions=True)

    return asyncio.run(asyncio.wait_for(all_at_once(), 120))


def tokens(chunks: list[EngineChunk], index: int = 0) -> list[int]:
    return [token for chunk in chunks if chunk.index == index for token in chunk.token_ids]


def text_of(chunks: list[EngineChunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def reference(lm: Any, ids: list[int], n: int) -> list[int]:
    """What `model.generate` says."""
    output = lm.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()
