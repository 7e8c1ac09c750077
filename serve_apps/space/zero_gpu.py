"""Text on ZeroGPU, which lends a Space a GPU for each call: the LM answers in the process that has it.

In: prompts. Out: chunks, as `PhiDeployment` gives them. CLIP and Whisper stay on the CPU. `spaces` runs a decorated
function in a process that has a GPU, which it may keep for later calls, so the LM is loaded there and stays as long as
that process does. Elsewhere `spaces` does nothing, and nothing here is used.
"""

import asyncio
import importlib
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm_core.engine.protocol import EngineChunk
from serve_apps.prompt import Prompt

if TYPE_CHECKING:
    from mmllm_core.bundle import Bundle
    from serve_apps.config import PhiConfig, ServeConfig
    from serve_apps.phi_app import PhiDeployment

GPU_SECONDS = 120
"""That a call may take, loading included; a visitor's share of GPU time must reach so far."""


def prepare() -> None:
    """Load `spaces`, where there is such a thing: it must come before torch."""
    with suppress(ModuleNotFoundError):
        importlib.import_module("spaces")


def borrowed_phi(bundle: "Bundle", config: "ServeConfig") -> "ZeroGpuPhi | None":
    """What answers where this Space borrows its GPU; None elsewhere."""
    return ZeroGpuPhi(bundle, config, importlib.import_module("spaces").GPU) if is_zero_gpu() else None


def is_zero_gpu() -> bool:
    """Whether this Space borrows its GPU."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


class ZeroGpuPhi:
    """Answers as `PhiDeployment` does, in a process that has a GPU.

    Args:
        lend: `spaces.GPU`, which makes of a function one that runs where a GPU is.
    """

    def __init__(self, bundle: "Bundle", config: "ServeConfig", lend: Callable[..., Any]):
        self._tokenizer = bundle.tokenizer
        self._asked = bundle.folder.absolute(), _on_gpu(config).model_dump_json()
        self._speak = lend(speak, duration=GPU_SECONDS)

    async def generate(self, prompt: Prompt) -> AsyncGenerator[EngineChunk, None]:
        """As `PhiDeployment.generate`; errors of the process that has the GPU come as `spaces` tells them."""
        from starlette.concurrency import iterate_in_threadpool

        chunks: Any = self._speak(*self._asked, prompt)
        try:
            async for chunk in iterate_in_threadpool(chunks):
                yield chunk
        finally:
            await asyncio.to_thread(chunks.close)

    def vocabulary(self) -> list[bytes]:
        """As `PhiDeployment.vocabulary`."""
        from mmllm_core.engine.grammar import token_bytes

        return token_bytes(self._tokenizer)

    def shutdown(self) -> None:
        """Nothing runs here."""


def speak(folder: Path, config: str, prompt: Prompt) -> Iterator[EngineChunk]:
    """The chunks of an answer; what `spaces` runs where the GPU is.

    Args:
        folder: of the bundle.
        config: a `PhiConfig` as JSON.
    """
    phi = _loaded(folder, config)
    with asyncio.Runner() as runner:
        chunks = phi.generate(prompt)
        try:
            while (chunk := runner.run(_next(chunks))) is not None:
                yield chunk
        finally:
            runner.run(chunks.aclose())


@cache
def _loaded(folder: Path, config: str) -> "PhiDeployment":
    from mmllm_core.bundle import Bundle
    from serve_apps.config import PhiConfig
    from serve_apps.phi_app import PhiDeployment
    from serve_apps.served_bundles import ServedBundle

    bundle = Bundle.open(folder)
    return PhiDeployment({bundle.info.name: ServedBundle.of(bundle)}, PhiConfig.model_validate_json(config))


def _on_gpu(config: "ServeConfig") -> "PhiConfig":
    """Phi's own config for GPUs, for one visitor at a time."""
    import torch

    from serve_apps.config_files import load_serve_config

    return load_serve_config("phi").phi if torch.cuda.is_available() else config.phi


async def _next(chunks: AsyncGenerator[EngineChunk, None]) -> EngineChunk | None:
    return await anext(chunks, None)
