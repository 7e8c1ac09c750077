"""Several adapters in one engine: mixed in one batch, each answers as its own LM alone does."""

import asyncio
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm_core.config import LoraConfig
from mmllm_core.engine.lora import LoraAdapter, adaptable_layers, load_lora
from mmllm_core.engine.protocol import EngineChunk, EngineRequest, SamplingParams
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.errors import ConfigError, EngineError
from mmllm_core.language import add_adapter
from tests.conftest import TinyLM
from tests.mmllm_core.engine_subject import ask, reference, tokens

PROMPTS = [[5 + i, 20, *range(30, 33 + 7 * (i % 4))] for i in range(6)]
N = 24


@dataclass(frozen=True)
class Adapted:
    """An engine that takes adapters, and each adapter beside the LM that peft applies it to."""

    engine: TransformersEngine
    base: Any
    adapters: list[LoraAdapter]
    peft: list[Any]
    layers: dict[str, tuple[int, int]]


def trained(lm: Any, seed: int, **changes: Any) -> Any:
    """A LM with an adapter that changes its answers."""
    torch.manual_seed(seed)
    adapted = add_adapter(copy.deepcopy(lm), LoraConfig(**({"rank": 4, "alpha": 8} | changes))).eval()
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    return adapted


@pytest.fixture(scope="module", params=["llama", "phi3", "phi"])
def adapted(
    request: pytest.FixtureRequest, tiny_lm: TinyLM, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adapted]:
    lm = tiny_lm(request.param)
    layers = adaptable_layers(lm)
    some = {"phi3": ["qkv_proj"], "phi": ["dense"], "llama": ["k_proj", "v_proj", "up_proj"]}[request.param]
    peft = [trained(lm, 1), trained(lm, 2, rank=8), trained(lm, 3, target_modules=some), trained(lm, 4, layers=1)]
    adapters = []
    for i, model in enumerate(peft):
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        adapters.append(load_lora(folder, str(i), layers, dtype=torch.float32))
    engine = TransformersEngine(
        copy.deepcopy(lm), tokenizer, context_length=512, kv_cache_bytes=20_000_000, takes_adapters=True, step_tokens=32
    )
    engine._stop_ids = []
    yield Adapted(engine, lm, adapters, peft, layers)
    engine.shutdown()


def of(i: int, adapter: LoraAdapter | None, **sampling: Any) -> EngineRequest:
    namespace = "" if adapter is None else adapter.name
    params = SamplingParams(**({"max_tokens": N} | sampling))
    return EngineRequest(str(i), token_ids=tuple(PROMPTS[i]), sampling=params, adapter=adapter, namespace=namespace)


def together(engine: TransformersEngine, requests: list[EngineRequest]) -> list[list[EngineChunk]]:
    async def all_at_once() -> list[list[EngineChunk]]:
        return await asyncio.gather(*(ask(engine, request) for request in requests))

    return asyncio.run(asyncio.wait_for(all_at_once(), 120))


@pytest.mark.lengthy
def test_adapters_mixed_in_one_batch_answer_as_each_alone(adapted: Adapted) -> None:
    models = [*zip(adapted.adapters, adapted.peft, strict=True), (None, adapted.base)]
    requests = [of(i, adapter) for i in range(len(PROMPTS)) for adapter, _ in models]
    expected = [reference(lm, PROMPTS[i], N) for i in range(len(PROMPTS)) for _, lm in models]
    assert len({tuple(answer) for answer in expected[:5]}) == 5  # each adapter answers otherwise
    for _ in range(2):  # the second time prompts are found in the cache, each by its own adapter
        found = together(adapted.engine, requests)
        assert [tokens(chunks) for chunks in found] == expected


def test_one_adapter_alone_and_the_base_alone(adapted: Adapted) -> None:
    for adapter, lm in ((adapted.adapters[1], adapted.peft[1]), (None, adapted.base)):
        found = together(adapted.engine, [of(i, adapter) for i in range(3)])
        assert [tokens(chunks) for chunks in found] == [reference(lm, PROMPTS[i], N) for i in range(3)]


def test_what_one_adapter_computed_is_not_found_by_another(adapted: Adapted) -> None:
    prompt = tuple(40 + i * i % 200 for i in range(100))
    seen = {}
    for adapter, lm in zip(adapted.adapters[:2], adapted.peft[:2], strict=True):
        request = EngineRequest(
            "a", token_ids=prompt, sampling=SamplingParams(max_tokens=8), adapter=adapter, namespace=adapter.name
        )
        for again in (False, True):
            [chunks] = together(adapted.engine, [request])
            seen[adapter.name, again] = chunks[-1].cached_tokens
            assert tokens(chunks) == reference(lm, list(prompt), 8)
    assert seen == {("0", False): 0, ("0", True): 96, ("1", False): 0, ("1", True): 96}


def test_an_engine_without_adapters_refuses_one(tiny_lm: TinyLM, tokenizer: Any) -> None:
    engine = TransformersEngine(tiny_lm("llama"), tokenizer, context_length=128, kv_cache_bytes=1_000_000)
    with pytest.raises(EngineError, match="started without them"):
        together(engine, [of(0, LoraAdapter("a", Path(), {}))])
    engine.shutdown()


def test_adapters_that_do_not_fit_are_refused_by_name(tiny_lm: TinyLM, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    trained(lm, 1).save_pretrained(tmp_path)
    narrow = adaptable_layers(tiny_lm("llama", intermediate_size=96))
    with pytest.raises(ConfigError, match=r"'mine'.*which the LM has not"):
        load_lora(tmp_path, "mine", narrow, dtype=torch.float32)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(ConfigError, match=r"'mine'.*use_dora"):
        load_lora(tmp_path, "mine", adaptable_layers(lm), dtype=torch.float32)
