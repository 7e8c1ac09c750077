import base64
import json
from dataclasses import replace
from typing import Any

import pytest

from mmllm_core.conversation import ImagePart, SpeechPart, TextPart
from mmllm_core.errors import AudioError, BadInput, SchemaError
from serve_apps.limits import Limits
from serve_apps.openai_protocol import ChatCall, parse_request, with_transcripts

LIMITS = Limits()


def parse(content: Any = "Hi", limits: Limits = LIMITS, **fields: Any) -> ChatCall:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]} | fields
    return parse_request(json.dumps(body).encode(), limits)


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def audio(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def test_parts_keep_their_order_and_files_know_their_field() -> None:
    call = parse([audio(b"a"), image(b"1"), text("Compare"), image(b"2")])
    assert call.messages[0].parts == (SpeechPart(""), ImagePart(), TextPart("Compare"), ImagePart())
    assert [(upload.data, upload.param) for upload in (*call.images, *call.clips)] == [
        (b"1", "messages.0.content.1.image_url"),
        (b"2", "messages.0.content.3.image_url"),
        (b"a", "messages.0.content.0.input_audio"),
    ]


def test_a_developer_is_the_system_and_a_reply_can_be_sent_back_as_it_came() -> None:
    reply = {"role": "assistant", "content": "Yes?", "refusal": None, "annotations": [], "tool_calls": None}
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}, reply]
    call = parse(messages=messages)
    assert [message.role for message in call.messages] == ["system", "user", "assistant"]
    assert call.messages[2].parts == (TextPart("Yes?"),)


def test_what_the_caller_leaves_out_comes_from_the_limits() -> None:
    limits = Limits(default_max_tokens=7, default_temperature=0.5)
    assert (parse(limits=limits).sampling.max_tokens, parse(limits=limits).sampling.temperature) == (7, 0.5)
    sampling = parse(limits=limits, max_tokens=3, max_completion_tokens=4, temperature=0, seed=1, stop="x").sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, sampling.stop) == (4, 0.0, 1, ("x",))


@pytest.mark.parametrize("fields", [{"top_p": 0, "temperature": 1}, {"temperature": 1e-30}])
def test_a_nucleus_or_temperature_without_choice_is_greedy(fields: dict[str, Any]) -> None:
    sampling = parse(**fields).sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


def test_fields_that_ask_for_nothing_are_let_pass_and_the_same_fields_are_refused_when_they_ask() -> None:
    parse(tools=[], logit_bias={}, user="me", audio=None)
    for field, value in {"tools": [{"type": "function"}], "logit_bias": {"5": 1}, "audio": {"voice": "a"}}.items():
        with pytest.raises(BadInput, match="not supported") as caught:
            parse(**{field: value})
        assert caught.value.param == field


def test_all_that_says_how_tokens_are_chosen_reaches_the_engine() -> None:
    fields = {"top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1}
    sampling = parse(**fields, min_tokens=2, n=3, logprobs=True, top_logprobs=4, seed=-1, temperature=1).sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.min_tokens, sampling.n, sampling.logprobs, sampling.seed) == (2, 3, 4, 2**63 - 1)
    plain = parse(logprobs=False, n=None, top_k=-1).sampling
    assert (plain.logprobs, plain.n, plain.top_k, plain.json_schema) == (None, 1, 0, None)
    assert parse(logprobs=True).sampling.logprobs == 0
    assert parse(ignore_eos=True, max_tokens=7).sampling.min_tokens == 7
    assert parse(ignore_eos=False, max_tokens=7, min_tokens=2).sampling.min_tokens == 2


def test_formats_become_schemas() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    found = parse(response_format=asked).sampling.json_schema
    assert found is not None
    assert json.loads(found) == schema
    assert parse(response_format={"type": "json_object"}).sampling.json_schema == '{"type": "object"}'
    assert parse(response_format={"type": "text"}).sampling.json_schema is None
    with pytest.raises(SchemaError, match="at most 10 are allowed"):
        parse(response_format=asked, limits=Limits(max_schema_chars=10))


def test_too_many_files_and_too_much_text_are_refused_before_any_model_works() -> None:
    limits = Limits(max_images=1, max_audio_clips=1, max_text_chars=5)
    for content in ([image(b"1")] * 2, [audio(b"1")] * 2, "123456"):
        with pytest.raises(BadInput, match="at most"):
            parse(content, limits)
    parse([image(b"1"), audio(b"1"), text("12345")], limits)


def test_only_users_send_files() -> None:
    with pytest.raises(BadInput, match="holds text only") as caught:
        parse(messages=[{"role": "system", "content": [text("See"), image(b"1")]}])
    assert caught.value.param == "messages.0.content.1"


def test_transcripts_go_where_their_clips_were() -> None:
    call = parse([audio(b"1"), text("and"), audio(b"2")])
    [message] = with_transcripts(call, ["one", "two"])
    assert message.parts == (SpeechPart("one"), TextPart("and"), SpeechPart("two"))


def test_silence_alone_is_refused_and_silence_beside_a_question_is_not() -> None:
    call = parse([audio(b"1")])
    with pytest.raises(AudioError, match="no speech") as caught:
        with_transcripts(call, [" "])
    assert caught.value.param == "messages.0.content.0.input_audio"
    beside = parse([text("What was that?"), audio(b"1")])
    assert with_transcripts(beside, [""]) == (replace(beside.messages[0]),)
