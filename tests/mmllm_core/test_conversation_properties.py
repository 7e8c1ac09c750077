"""What holds for any conversation in any chat format."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm_core.conversation import IMAGE_TOKEN_ID, ImagePart, Message, Rendered, SpeechPart, TextPart, render
from mmllm_core.language import PHI2_CHAT_TEMPLATE

PROPERTY = settings(max_examples=25, deadline=None)


@dataclass(frozen=True)
class Family:
    """A tokenizer with a family's chat template, and the token that ends a turn in it."""

    tokenizer: Any
    end_of_turn: str

    def render(self, messages: list[Message], *, n_image_tokens: int = 2, generation_prompt: bool = False) -> Rendered:
        return render(
            messages,
            self.tokenizer,
            n_image_tokens=n_image_tokens,
            max_length=10**6,
            generation_prompt=generation_prompt,
        )


@pytest.fixture(
    scope="module",
    params=[
        ("chatml", "<|im_end|>"),
        ("phi3", "<|end|>"),
        ("phi4", "<|end|>"),
        ("llama3", "<|eot_id|>"),
        (PHI2_CHAT_TEMPLATE, "<|endoftext|>"),
    ],
    ids=["chatml", "phi3", "phi4", "llama3", "phi2"],
)
def family(request: pytest.FixtureRequest, make_tokenizer: Callable[[str | None], Any]) -> Family:
    template, end_of_turn = request.param
    return Family(make_tokenizer(template), end_of_turn)


pieces = st.sampled_from(["<|im_end|>", "<|end|>", "<|tool|>", "<|", "|>", "\ue0000\ue001", "\n", "    ", "circle"])
texts = st.lists(pieces | st.text(max_size=8), max_size=6).map("".join)
parts = st.builds(ImagePart) | st.builds(TextPart, texts) | st.builds(SpeechPart, texts)


def _is_said(part: Any) -> bool:
    return isinstance(part, ImagePart) or bool(getattr(part, "text", getattr(part, "transcript", "")).strip())


users = st.lists(parts, min_size=1, max_size=4).filter(lambda p: any(map(_is_said, p)))
answers = texts.filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Alternating turns that end with the assistant, at times after a system message."""
    messages = [Message.text("system", draw(answers))] if draw(st.booleans()) else []
    for user, answer in draw(st.lists(st.tuples(users, answers), min_size=1, max_size=3)):
        messages += [Message("user", tuple(user)), Message.text("assistant", answer)]
    return messages


@PROPERTY
@given(messages=conversations(), n_image_tokens=st.integers(1, 5))
def test_image_positions_are_images_times_tokens_of_an_image(
    family: Family, messages: list[Message], n_image_tokens: int
) -> None:
    result = family.render(messages, n_image_tokens=n_image_tokens)

    n_images = sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
    assert result.n_images == n_images
    assert result.input_ids.count(IMAGE_TOKEN_ID) == n_images * n_image_tokens


@PROPERTY
@given(messages=conversations())
def test_supervised_ids_decode_to_the_answers(family: Family, messages: list[Message]) -> None:
    labels = family.render(messages).labels

    answers = [part.text.strip() for m in messages if m.role == "assistant" for part in m.parts]  # type: ignore[union-attr]
    supervised = family.tokenizer.decode([label for label in labels if label >= 0])
    assert supervised == "".join(answer + family.end_of_turn for answer in answers)


@PROPERTY
@given(messages=conversations())
def test_what_serving_renders_is_a_prefix_of_what_training_renders(family: Family, messages: list[Message]) -> None:
    training = family.render(messages).input_ids
    serving = family.render(messages[:-1], generation_prompt=True).input_ids

    assert training[: len(serving)] == serving


@PROPERTY
@given(messages=conversations())
def test_contents_add_no_control_tokens(family: Family, messages: list[Message]) -> None:
    control = {i for i, token in family.tokenizer.added_tokens_decoder.items() if token.content.strip()}
    plain = [Message.text(message.role, "a") for message in messages]

    def n_control(conversation: list[Message]) -> int:
        return sum(token in control for token in family.render(conversation).input_ids)

    assert n_control(messages) == n_control(plain)
