"""Rendering in every family's chat format: what is supervised, what a user cannot do, where images go."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mmllm_core.conversation import IMAGE_TOKEN_ID, ImagePart, Message, Rendered, SpeechPart, TextPart, render
from mmllm_core.errors import ConversationError
from mmllm_core.language import PHI2_CHAT_TEMPLATE

FORMATS = ("chatml", "phi3", "phi4", "llama3", "phi2")
END_OF_TURN = {
    "chatml": "<|im_end|>",
    "phi3": "<|end|>",
    "phi4": "<|end|>",
    "llama3": "<|eot_id|>",
    "phi2": "<|endoftext|>",
}
EXCHANGE = (Message.text("user", "What is there?"), Message.text("assistant", "The circle."))
LOOK = Message("user", (ImagePart(), TextPart("What colour is the circle?")))


@pytest.fixture(params=FORMATS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family_tokenizer(family: str, make_tokenizer: Callable[[str | None], Any]) -> Any:
    return make_tokenizer(PHI2_CHAT_TEMPLATE if family == "phi2" else family)


def rendered(messages: Any, tokenizer: Any, *, max_length: int = 1000) -> Rendered:
    """For training if the assistant has the last word, else for serving."""
    asks = not any(m.role == "assistant" for m in messages[-1:])
    return render(messages, tokenizer, n_image_tokens=3, max_length=max_length, generation_prompt=asks)


def text_of(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode([i for i in ids if i >= 0])


def test_text_is_what_the_chat_template_renders(family_tokenizer: Any) -> None:
    messages = [{"role": m.role, "content": m.parts[0].text} for m in EXCHANGE]  # type: ignore[union-attr]
    expected = family_tokenizer.apply_chat_template(messages, tokenize=False)

    assert text_of(rendered(EXCHANGE, family_tokenizer).input_ids, family_tokenizer) == expected


def test_labels_are_the_answer_and_its_end_of_turn_token(family: str, family_tokenizer: Any) -> None:
    labels = rendered(EXCHANGE, family_tokenizer).labels

    assert text_of(labels, family_tokenizer) == "The circle." + END_OF_TURN[family]


def test_every_assistant_turn_is_supervised(family: str, family_tokenizer: Any) -> None:
    end = END_OF_TURN[family]
    second = (Message.text("user", "And now?"), Message.text("assistant", "It is blue."))

    labels = rendered(EXCHANGE + second, family_tokenizer).labels

    assert text_of(labels, family_tokenizer) == f"The circle.{end}It is blue.{end}"


def test_labels_stand_at_the_positions_of_their_tokens(family_tokenizer: Any) -> None:
    result = rendered(EXCHANGE, family_tokenizer)

    assert all(label in (-100, token) for token, label in zip(result.input_ids, result.labels, strict=True))


def test_generation_prompt_ends_where_training_begins_to_supervise(family_tokenizer: Any) -> None:
    training = rendered(EXCHANGE, family_tokenizer)
    serving = rendered(EXCHANGE[:1], family_tokenizer)

    first_supervised = next(i for i, label in enumerate(training.labels) if label >= 0)
    assert serving.input_ids == training.input_ids[:first_supervised]


@pytest.mark.parametrize(
    "control", ["<|im_end|>", "<|end|>", "<|eot_id|>", "<|endoftext|>", "<|assistant|>", "<|tool|>"]
)
def test_control_tokens_typed_by_a_user_are_text(family_tokenizer: Any, control: str) -> None:
    typed = f"a{control}b"
    honest = rendered([Message.text("user", "a")], family_tokenizer).input_ids
    result = rendered([Message.text("user", typed)], family_tokenizer).input_ids
    control_id = family_tokenizer.convert_tokens_to_ids(control)

    assert result.count(control_id) == honest.count(control_id)
    assert typed in text_of(result, family_tokenizer)


def test_control_tokens_that_were_heard_are_text(tokenizer: Any) -> None:
    result = rendered([Message("user", (SpeechPart("a<|im_end|>b"),))], tokenizer)

    assert result.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2  # the system's and the user's


def test_control_tokens_nested_in_each_other_are_text(tokenizer: Any) -> None:
    result = rendered([Message.text("user", "<|im_<|im_end|>end|><<|im_end|>")], tokenizer)

    assert result.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_added_tokens_that_are_runs_of_spaces_stay_whole(tokenizer: Any) -> None:
    result = rendered([Message.text("user", "if a:    b")], tokenizer)

    assert tokenizer.convert_tokens_to_ids("    ") in result.input_ids


def test_threads_that_render_at_once_do_not_disturb_each_other(tokenizer: Any) -> None:
    messages = [Message.text("user", "What is <|im_end|> there? " * 20), Message.text("assistant", "A circle. " * 20)]
    alone = rendered(messages, tokenizer)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda _: rendered(messages, tokenizer), range(200)))

    assert all(result == alone for result in together)


def test_an_image_takes_its_positions_before_the_question(family_tokenizer: Any) -> None:
    ids = rendered([LOOK], family_tokenizer).input_ids
    first = ids.index(IMAGE_TOKEN_ID)

    assert ids[first : first + 3] == [IMAGE_TOKEN_ID] * 3
    assert ids.count(IMAGE_TOKEN_ID) == 3
    assert text_of(ids[first + 3 :], family_tokenizer).startswith("\nWhat colour is the circle?")


def test_images_are_never_supervised(family_tokenizer: Any) -> None:
    result = rendered([LOOK, EXCHANGE[1]], family_tokenizer)

    assert IMAGE_TOKEN_ID not in result.labels


def test_images_of_all_turns_are_counted(tokenizer: Any) -> None:
    result = rendered([Message("user", (ImagePart(), ImagePart())), EXCHANGE[1], LOOK], tokenizer)

    assert result.n_images == 3
    assert result.input_ids.count(IMAGE_TOKEN_ID) == 9


def test_speech_is_rendered_like_typed_text(tokenizer: Any) -> None:
    heard = rendered([Message("user", (SpeechPart(" What is there?"),))], tokenizer)

    assert heard == rendered([Message.text("user", "What is there?")], tokenizer)


def test_a_system_message_comes_first_in_the_text(tokenizer: Any) -> None:
    result = rendered([Message.text("system", "Be brief."), *EXCHANGE], tokenizer)

    assert text_of(result.input_ids, tokenizer).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_conversation_longer_than_allowed_is_rejected(tokenizer: Any) -> None:
    length = len(rendered([LOOK], tokenizer).input_ids)

    assert len(rendered([LOOK], tokenizer, max_length=length).input_ids) == length
    with pytest.raises(ConversationError, match=f"takes {length} tokens.*at most {length - 1}"):
        rendered([LOOK], tokenizer, max_length=length - 1)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([EXCHANGE[0], Message.text("system", "Be brief.")], "messages.1.role"),
        ([LOOK, Message("assistant", (ImagePart(),))], "messages.1.content"),
        ([Message.text("user", "  ")], "messages.0.content"),
    ],
    ids=["no messages", "system message later", "image from the assistant", "empty message"],
)
def test_an_error_names_the_message_at_fault(messages: list[Message], param: str, tokenizer: Any) -> None:
    with pytest.raises(ConversationError) as caught:
        rendered(messages, tokenizer)

    assert caught.value.param == param


@pytest.mark.parametrize("messages", [[LOOK], [Message.text("system", "Be brief."), LOOK]])
def test_a_conversation_that_supervises_nothing_is_not_trained_on(messages: list[Message], tokenizer: Any) -> None:
    with pytest.raises(ConversationError, match="nothing is supervised"):
        render(messages, tokenizer, n_image_tokens=3, max_length=1000, generation_prompt=False)


def test_a_template_that_drops_a_turn_is_an_error(make_tokenizer: Callable[[str | None], Any]) -> None:
    users_only = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )

    with pytest.raises(ConversationError, match="does not place every message"):
        rendered(EXCHANGE, users_only)


def test_a_template_that_refuses_says_why(make_tokenizer: Callable[[str | None], Any]) -> None:
    refuses = make_tokenizer("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(ConversationError, match="roles must alternate"):
        rendered(EXCHANGE, refuses)
