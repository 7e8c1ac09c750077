"""Counted lengths are the renderer's, and the bound never promises too much."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmllm_core.conversation import render
from mmllm_core.data.record import FaultKind, Record, Turn, messages_of
from mmllm_core.data.token_count import LengthCounter, Rendering
from tests.conftest import CHAT_TEMPLATES, MakeTokenizer

TEXTS = st.one_of(
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=30),
    st.lists(
        st.sampled_from(["<|im_end|>", "<|tool|>", "    ", "What colour", "猫", "\n", "<|", "is"]), max_size=6
    ).map("".join),
).filter(lambda text: bool(text.strip()) and "<image>" not in text)


@st.composite
def records(draw: st.DrawFn) -> Record:
    n_images = draw(st.integers(0, 2))
    first = draw(st.permutations([draw(TEXTS), *["<image>"] * n_images]))
    texts = ["".join(first), *draw(st.lists(TEXTS, min_size=1, max_size=3))]
    roles = ("user", "assistant") * 2
    system = (Turn("system", draw(TEXTS)),) if draw(st.booleans()) else ()
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))
    return Record("r", ("a.png",) * n_images, system + turns)


def spaced_tokenizer() -> Any:
    """SentencePiece's manner, as Phi-3: a space before each text, bytes for what the vocabulary lacks."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "i", "s", "▁i"]
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)}, [("▁", "i")], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATES["phi3"]
    return tokenizer


@pytest.fixture(scope="module", params=["chatml", "phi4", "spaced"])
def folder(
    request: pytest.FixtureRequest, make_tokenizer: MakeTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    tokenizer = spaced_tokenizer() if request.param == "spaced" else make_tokenizer(request.param)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def counters(folder: Path) -> list[LengthCounter]:
    return [LengthCounter(Rendering(folder, n_image_tokens=5, max_length=length)) for length in range(20, 400, 20)]


@given(record=records())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_record_is_too_long_exactly_when_its_rendering_is(counters: list[LengthCounter], record: Record) -> None:
    tokenizer = counters[0]._tokenizer
    rendered = render(messages_of(record), tokenizer, n_image_tokens=5, max_length=sys.maxsize, generation_prompt=False)
    length = len(rendered.input_ids)
    for counter in counters:
        (fault,) = counter.faults([record])
        assert (fault is not None) == (length > counter._rendering.max_length)
        assert fault is None or f"takes {length} tokens" in fault.detail
        assert not (counter.surely_fits(record) and fault)


def test_the_bound_settles_short_records(counters: list[LengthCounter]) -> None:
    record = Record("r", (), (Turn("user", "What is it?"), Turn("assistant", "A cat.")))
    assert counters[-1].surely_fits(record)
    assert not counters[0].surely_fits(record)


def test_a_tokenizer_that_may_lengthen_texts_has_no_bound(tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
    from tokenizers import normalizers

    tokenizer = make_tokenizer("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKD()
    tokenizer.save_pretrained(tmp_path)
    counter = LengthCounter(Rendering(tmp_path, 5, 10_000))
    record = Record("r", (), (Turn("user", "ﷺ"), Turn("assistant", "A cat.")))
    assert not counter.surely_fits(record)
    assert counter.faults([record]) == [None]


def test_a_template_that_refuses_a_role_is_told(tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    make_tokenizer(template + CHAT_TEMPLATES["chatml"]).save_pretrained(tmp_path)
    counter = LengthCounter(Rendering(tmp_path, 5, 10_000))
    turns = (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Ho"))
    refused, fine = counter.faults([Record("r", (), turns), Record("r", (), turns[1:])])
    assert fine is None
    assert refused is not None
    assert refused.kind is FaultKind.NOT_RENDERED
    assert "no system turns" in refused.detail
    assert not counter.surely_fits(Record("r", (), turns))
