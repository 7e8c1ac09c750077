"""Engines that tests of their promises share: vLLM takes a quarter of a minute to start."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mmllm_core.config import VllmConfig
from mmllm_core.engine.protocol import Engine, StartEngine
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.engine.vllm_engine import VllmEngine
from mmllm_core.extensions import load_extension
from mmllm_core.language import stop_token_ids
from tests.conftest import TinyLM
from tests.mmllm_core.engine_subject import CONTEXT, ENGINES, WIDER, Start, Subject


@pytest.fixture(scope="session")
def start_subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start an engine of a kind on an LM, which `generate` then has to itself."""
    started: list[Engine] = []

    def build(kind: str, lm: Any, tokenizer: Any) -> Subject:
        folder = tmp_path_factory.mktemp("lm")
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        stop_ids = stop_token_ids(lm, tokenizer)
        engine: Any
        if kind == "vllm":
            settings = {
                "config": VllmConfig(),
                "kv_cache_bytes": 100_000_000,
                "stop_ids": stop_ids,
                "dtype": torch.float32,
            }
            engine = VllmEngine(folder, tokenizer, embed=lm.get_input_embeddings(), context_length=CONTEXT, **settings)
        else:
            own = kind == "transformers"
            start: StartEngine = TransformersEngine if own else load_extension("mmllm.engines", kind)
            engine = start(
                type(lm).from_pretrained(folder, dtype=torch.float32).eval(),
                tokenizer,
                context_length=CONTEXT,
                kv_cache_bytes=100_000_000,
                max_sequences=64,
                step_tokens=256,
                n_threads=torch.get_num_threads(),
            )
        started.append(engine)
        subject = Subject(engine, lm, tokenizer, stop_ids)
        subject.ending_with()
        return subject

    yield build
    for engine in started:
        engine.shutdown()


@pytest.fixture(scope="session", params=ENGINES)
def _tiny_subject(request: pytest.FixtureRequest, start_subject: Start, tiny_lm: TinyLM, tokenizer: Any) -> Subject:
    return start_subject(request.param, tiny_lm("llama", **WIDER), tokenizer)


@pytest.fixture
def subject(_tiny_subject: Subject) -> Subject:
    """Each engine in turn, on a tiny Llama, with no token that ends answers."""
    _tiny_subject.ending_with()
    return _tiny_subject
