"""The parts of the deployments that need neither Ray nor a model."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import numpy as np
import pytest

from mmllm_core.engine.protocol import EngineChunk, FinishReason
from serve_apps.feature_cache import FeatureCache
from serve_apps.phi_app import coalesce


def chunk(n: int, finish_reason: FinishReason | None = None) -> EngineChunk:
    return EngineChunk(str(n), (n,), prompt_tokens=3, completion_tokens=n, finish_reason=finish_reason)


class Source:
    """Chunks 1 to `n` with a wait before each but the first; notes when it is closed."""

    def __init__(self, n: int, wait_s: float, error: Exception | None = None):
        self.closed = False
        self.chunks = self._chunks(n, wait_s, error)

    async def _chunks(self, n: int, wait_s: float, error: Exception | None) -> AsyncIterator[EngineChunk]:
        try:
            for i in range(1, n + 1):
                if i > 1:
                    await asyncio.sleep(wait_s)
                yield chunk(i, "stop" if i == n and error is None else None)
            if error is not None:
                raise error
        finally:
            self.closed = True


def collect(source: Source, interval_s: float) -> list[EngineChunk]:
    async def run() -> list[EngineChunk]:
        return [item async for item in coalesce(source.chunks, lambda: interval_s)]

    return asyncio.run(run())


def test_the_first_chunk_comes_alone_and_the_rest_together_with_nothing_lost() -> None:
    first, rest = collect(Source(5, wait_s=0), interval_s=60)
    assert first == chunk(1)
    assert rest == EngineChunk("2345", (2, 3, 4, 5), prompt_tokens=3, completion_tokens=5, finish_reason="stop")


def test_slow_chunks_are_not_held_back() -> None:
    assert collect(Source(3, wait_s=0.05), interval_s=0.0) == [chunk(1), chunk(2), chunk(3, "stop")]


def test_text_is_held_no_longer_than_the_interval() -> None:
    async def run() -> float:
        loop = asyncio.get_running_loop()
        source = Source(3, wait_s=0.0)
        stream = coalesce(_then_hang(source.chunks), lambda: 0.05)
        await anext(stream)
        start = loop.time()
        assert (await anext(stream)).text == "23"
        elapsed = loop.time() - start
        await stream.aclose()
        return elapsed

    async def _then_hang(chunks: AsyncIterator[EngineChunk]) -> AsyncIterator[EngineChunk]:
        async for item in chunks:
            yield item
        await asyncio.Event().wait()

    assert asyncio.run(run()) < 2


def test_an_error_comes_after_the_text_before_it() -> None:
    texts: list[str] = []

    async def run() -> None:
        async for item in coalesce(Source(3, wait_s=0, error=RuntimeError("broke")).chunks, lambda: 60):
            texts.append(item.text)

    with pytest.raises(RuntimeError, match="broke"):
        asyncio.run(run())
    assert "".join(texts) == "123"


def test_closing_the_stream_closes_its_source() -> None:
    async def run() -> bool:
        source = Source(100, wait_s=0.01)
        stream = coalesce(source.chunks, lambda: 0)
        await anext(stream)
        await stream.aclose()
        return source.closed

    assert asyncio.run(run())


def features(fill: float) -> np.ndarray:
    return np.full((2, 4), fill, np.float16)  # 16 bytes


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    cache = FeatureCache(max_bytes=2 * features(0).nbytes)
    cache.put("a", features(1))
    cache.put("b", features(2))
    assert cache.get("a") is not None  # now b was used longest ago
    cache.put("c", features(3))
    assert cache.get("b") is None
    found = cache.get("a")
    assert found is not None
    assert found[0, 0] == 1
    assert len(cache) == 2


def test_putting_a_key_again_takes_no_room() -> None:
    cache = FeatureCache(max_bytes=2 * features(0).nbytes)
    for _ in range(5):
        cache.put("a", features(1))
    cache.put("b", features(2))
    assert len(cache) == 2


def test_a_cache_without_room_remembers_nothing() -> None:
    cache = FeatureCache(max_bytes=0)
    cache.put("a", features(1))
    assert cache.get("a") is None


def test_what_composes_the_deployments_and_the_http_side_load_no_torch() -> None:
    script = "import sys, serve_apps.builder, serve_apps.assistant_app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
