"""The processor's ids with tokenizers in the manner of SentencePiece, as Phi-3's and Llama 2's are."""

from typing import Any

import pytest

from mmllm_core.conversation import IMAGE_TOKEN_ID, ImagePart, Message, TextPart, render
from mmllm_core.errors import ExportError
from mmllm_core.interop.clip_weights import HuggingFaceTower
from mmllm_core.interop.llava_chat import PHI3_CHAT_TEMPLATE
from mmllm_core.interop.llava_processor import build_processor, processor_ids

VICUNA = (
    "{% for m in messages %}{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture
def tower() -> HuggingFaceTower:
    from transformers import CLIPVisionConfig

    square = {"height": 32, "width": 32}
    processor = {"size": {"shortest_edge": 32}, "crop_size": square, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return HuggingFaceTower(CLIPVisionConfig(image_size=32, patch_size=8), {}, processor)


@pytest.fixture
def sentencepiece() -> Any:
    """BPE over text in which a space is `▁`, with one put before every stretch, and Phi-3's control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    texts = ["USER: What colour is it?", "ASSISTANT: It is blue.\n", "Hello why? 3 + 4 = 7", "\n\n()#!-été"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"):
        backend.add_special_tokens([AddedToken(token, rstrip=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def test_phi3s_ids_are_the_renderers(sentencepiece: Any, tower: HuggingFaceTower) -> None:
    sentencepiece.chat_template = PHI3_CHAT_TEMPLATE
    messages = [
        Message("user", (ImagePart(), TextPart("What colour is it?"))),
        Message("assistant", (TextPart("It is blue."),)),
        Message("user", (TextPart("Hello\n\nagain"), ImagePart())),
    ]
    ours = render(messages, sentencepiece, n_image_tokens=3, max_length=999, generation_prompt=True).input_ids
    processor = build_processor(sentencepiece, tower, cls_token=False)
    assert processor_ids(processor, messages, 3) == [
        processor.image_token_id if token == IMAGE_TOKEN_ID else token for token in ours
    ]


def test_a_template_with_words_beside_contents_is_refused(sentencepiece: Any, tower: HuggingFaceTower) -> None:
    sentencepiece.chat_template = VICUNA
    with pytest.raises(ExportError, match="inexact-ids"):
        build_processor(sentencepiece, tower, cls_token=False)


def test_an_image_token_that_is_there_already_is_used(sentencepiece: Any, tower: HuggingFaceTower) -> None:
    sentencepiece.chat_template = PHI3_CHAT_TEMPLATE
    sentencepiece.add_tokens(["<image>"], special_tokens=True)
    known = sentencepiece.convert_tokens_to_ids("<image>")
    assert build_processor(sentencepiece, tower, cls_token=True).image_token_id == known
    assert len(sentencepiece) == known + 1


def test_a_processor_counts_the_tokens_of_both_strategies(sentencepiece: Any, tower: HuggingFaceTower) -> None:
    from PIL import Image

    sentencepiece.chat_template = PHI3_CHAT_TEMPLATE
    for cls_token, n_tokens in ((False, 16), (True, 17)):
        processor = build_processor(sentencepiece, tower, cls_token=cls_token)
        ids = processor(text="<image>", images=Image.new("RGB", (50, 40))).input_ids
        assert sum(token == processor.image_token_id for token in ids[0]) == n_tokens
        sentencepiece.chat_template = PHI3_CHAT_TEMPLATE
