"""What is vLLM's alone: adapters that it applies, what it cannot do, and how it dies."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm_core.config import VllmConfig
from mmllm_core.engine.protocol import EngineChunk, EngineRequest, SamplingParams
from mmllm_core.engine.vllm_engine import VllmEngine, require_vllm
from mmllm_core.errors import ConfigError, EngineError
from tests.conftest import TinyLM

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM: make test-vllm")
WIDER = {"hidden_size": 128, "intermediate_size": 160}
Start = Callable[..., VllmEngine]


@pytest.fixture
def start(tmp_path: Path, tokenizer: Any) -> Iterator[Start]:
    started = []

    def build(lm: Any, **settings: Any) -> VllmEngine:
        lm.save_pretrained(tmp_path / "lm")
        tokenizer.save_pretrained(tmp_path / "lm")
        given = {"embed": lm.get_input_embeddings(), "stop_ids": [], "context_length": 256, "config": VllmConfig()}
        given |= {"kv_cache_bytes": 100_000_000, "dtype": torch.float32}
        started.append(VllmEngine(tmp_path / "lm", tokenizer, **(given | settings)))
        return started[-1]

    yield build
    for engine in started:
        engine.shutdown()


async def ask(engine: VllmEngine, ids: list[int], **sampling: Any) -> list[EngineChunk]:
    request = EngineRequest("a", token_ids=tuple(ids), sampling=SamplingParams(**sampling))
    return [chunk async for chunk in engine.generate(request)]


def greedy(lm: Any, ids: list[int], n: int) -> list[int]:
    mask, settings = torch.ones(1, len(ids)), {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return lm.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=n, **settings)[0, len(ids) :].tolist()


@needs_vllm
def test_an_adapter_is_applied(start: Start, tiny_lm: TinyLM, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_lm("llama", **WIDER)
    torch.manual_seed(1)
    adapted = get_peft_model(
        tiny_lm("llama", **WIDER), LoraConfig(r=12, lora_alpha=24, target_modules=["q_proj", "v_proj"])
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = greedy(adapted.eval(), [5, 20, 30], 16)
    assert expected != greedy(base, [5, 20, 30], 16)
    engine = start(base, adapter=tmp_path / "adapter")
    found = asyncio.run(asyncio.wait_for(ask(engine, [5, 20, 30], max_tokens=16), 100))
    assert [token for chunk in found for token in chunk.token_ids] == expected


@needs_vllm
def test_a_process_that_dies_fails_its_requests_and_its_health(start: Start, tiny_lm: TinyLM) -> None:
    engine = start(tiny_lm("llama", **WIDER, max_position_embeddings=20_000), context_length=20_000)

    async def die() -> list[Any]:
        asking = [asyncio.ensure_future(ask(engine, [20, i], max_tokens=19_000, temperature=2.0)) for i in range(2)]
        await asyncio.sleep(0.3)
        processes = _engine_processes(os.getpid())
        assert processes
        for process in processes:
            os.kill(process, signal.SIGKILL)
        return await asyncio.gather(*asking, return_exceptions=True)

    failed = asyncio.run(asyncio.wait_for(die(), 100))
    assert all(isinstance(error, EngineError) for error in failed), failed
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not engine._llm.errored:
        time.sleep(0.1)
    with pytest.raises(EngineError, match="down"):
        engine.health()
    with pytest.raises(EngineError, match="down"):
        asyncio.run(ask(engine, [20], max_tokens=1))


def _engine_processes(pid: int) -> list[int]:
    """vLLM's processes whose parent is a process."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    return [int(child) for child, parent, args in rows if int(parent) == pid and "EngineCore" in args]


@needs_vllm
def test_what_needs_a_gpu_is_refused_without_one() -> None:
    with pytest.raises(ConfigError, match="nf4 needs a GPU"):
        require_vllm(VllmConfig(quantization="nf4"), "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="tensor_parallel: 2 GPUs, and there are 0"):
            require_vllm(VllmConfig(tensor_parallel=2), "cuda")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_that_vllm_is_not_installed_is_said(tokenizer: Any, tmp_path: Path) -> None:
    given = {"stop_ids": [], "context_length": 8, "dtype": torch.float32, "config": VllmConfig()}
    with pytest.raises(ConfigError, match=r"pip install 'mmllm\[vllm\]'"):
        VllmEngine(tmp_path, tokenizer, embed=lambda ids: ids, **given)
