"""Streamed text comes in whole characters, and never holds a part of a stop string."""

from typing import Any

import pytest

from mmllm_core.engine.text_stream import TextStream


def stream_of(tokenizer: Any, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("text", ["What colour?", "naïve 🌍 çà va", "日本語 text", "  spaces  kept "])
def test_streamed_text_is_the_whole_text_in_whole_characters(text: str, tokenizer: Any) -> None:
    pieces = stream_of(tokenizer, text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_stop_string_across_tokens_never_leaks(tokenizer: Any) -> None:
    assert "".join(stream_of(tokenizer, "one two END three", ("END",))) == "one two "


def test_what_only_looked_like_a_stop_string_is_given_back(tokenizer: Any) -> None:
    assert "".join(stream_of(tokenizer, "one EN", ("END",))) == "one EN"


def test_a_stop_string_that_ends_in_an_unfinished_character_never_leaks(tokenizer: Any) -> None:
    class Fixed:
        def decode(self, ids: list[int]) -> str:
            return b"".join({0: b"a EN", 1: b"D\xe6"}[i] for i in ids).decode(errors="replace")

    stream = TextStream(Fixed(), ("END",))  # type: ignore[arg-type]
    assert stream.push(0) + stream.push(1) + stream.flush() == "a "


@pytest.mark.parametrize("text", ["Hello , world .  It 's", "naïve 🌍 日本"])
def test_sentencepiece_text_is_streamed_whole(text: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"Helo,wrdIts'.nav"]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = stream_of(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
