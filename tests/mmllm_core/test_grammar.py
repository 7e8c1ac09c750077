"""Answers of random LMs, who know no JSON, keep to their schemas."""

import asyncio
import json
from typing import Any

import pytest

from mmllm_core.engine.protocol import EngineChunk, EngineRequest, SamplingParams
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.errors import SchemaError
from tests.conftest import TinyLM

SHAPE = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "sides": {"type": "integer", "minimum": 0, "maximum": 99},
        "is_red": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["shape", "sides", "is_red", "tags"],
}


@pytest.fixture
def engine(tiny_lm: TinyLM, tokenizer: Any) -> Any:
    engine = TransformersEngine(tiny_lm("llama"), tokenizer, context_length=512)
    yield engine
    engine.shutdown()


def ask(engine: TransformersEngine, **sampling: Any) -> list[EngineChunk]:
    async def complete() -> list[EngineChunk]:
        request = EngineRequest("a", token_ids=(20, 30, 40), sampling=SamplingParams(**sampling))
        return [chunk async for chunk in engine.generate(request)]

    return asyncio.run(complete())


def text_of(chunks: list[EngineChunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 1.5, "seed": 3}, {"min_tokens": 200, "repetition_penalty": 1.3}]
)
def test_answers_are_of_the_schema_and_end_when_they_are_whole(
    changes: dict[str, Any], engine: TransformersEngine
) -> None:
    found = ask(engine, json_schema=json.dumps(SHAPE), max_tokens=300, **changes)
    assert found[-1].finish_reason == "stop"
    value = json.loads(text_of(found))
    assert list(value) == SHAPE["required"]
    assert value["shape"] in ("circle", "square")
    assert 0 <= value["sides"] <= 99
    assert value["is_red"] in (True, False)
    assert set(value["tags"]) <= {"a", "b"}


def test_each_answer_is_bound_by_itself_and_others_are_free(engine: TransformersEngine) -> None:
    bound = {"json_schema": json.dumps(SHAPE), "max_tokens": 300, "temperature": 1.0, "seed": 1, "n": 3}
    alone = ask(engine, max_tokens=30)

    async def together() -> list[list[EngineChunk]]:
        async def complete(id: str, **sampling: Any) -> list[EngineChunk]:
            request = EngineRequest(id, token_ids=(20, 30, 40), sampling=SamplingParams(**sampling))
            return [chunk async for chunk in engine.generate(request)]

        return await asyncio.gather(complete("bound", **bound), complete("free", max_tokens=30))

    several, free = asyncio.run(together())
    assert text_of(free) == text_of(alone)
    assert len({text_of(several, index) for index in range(3)}) > 1
    for index in range(3):
        assert list(json.loads(text_of(several, index))) == SHAPE["required"]


@pytest.mark.parametrize("schema", ["nonsense", '{"type": "shape"}', '{"$ref": "#/nowhere"}'])
def test_what_is_no_schema_is_refused(schema: str, engine: TransformersEngine) -> None:
    with pytest.raises(SchemaError, match="not a JSON schema") as refused:
        ask(engine, json_schema=schema)
    assert refused.value.param == "response_format"
    assert ".cc" not in str(refused.value)
    engine.health()
    assert engine.load().waiting == engine.load().running == 0
