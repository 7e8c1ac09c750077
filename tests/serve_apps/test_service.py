"""The whole service over HTTP, with the client that callers use."""

import base64
import concurrent.futures
import json
import re
from typing import Any, Literal

import httpx
import numpy as np
import openai
import pytest
from gradio_client import Client
from pydantic import BaseModel

from tests.serve_apps.conftest import (
    SERVE_AND_LONG_HAPROXY,
    Service,
    audio_part,
    data_uri,
    image_part,
    image_uri,
    page_answer,
    text_part,
    wav,
)

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("proxy", SERVE_AND_LONG_HAPROXY, indirect=True, scope="module")]

SAID = "never do it for free"


def post(service: Service, body: Any) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{service.base_url}/v1/chat/completions", content=data, timeout=60)


def answer(service: Service, content: Any, **fields: Any) -> str:
    reply = service.client().chat.completions.create(**service.body(content, temperature=0, **fields))
    assert reply.choices[0].message.content is not None
    return reply.choices[0].message.content


def test_text_is_answered_and_counted(service: Service) -> None:
    reply = service.client().chat.completions.create(**service.body("Hello", max_tokens=5))
    assert (reply.object, reply.model, reply.choices[0].message.role) == ("chat.completion", "tiny", "assistant")
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 5


def test_an_image_changes_the_answer_and_takes_its_positions(service: Service) -> None:
    red, blue = ([image_part(image_uri(colour)), text_part("What?")] for colour in ("red", "blue"))
    assert len({answer(service, content) for content in (red, blue, "What?")}) == 3
    assert answer(service, red) == answer(service, red)
    create = service.client().chat.completions.create
    with_image, without = create(**service.body(red)).usage, create(**service.body("What?")).usage
    assert with_image is not None
    assert without is not None
    assert with_image.prompt_tokens - without.prompt_tokens >= 16  # 32 px in patches of 8


def test_the_order_of_images_matters_and_a_batch_does_not(service: Service) -> None:
    red, blue = (image_part(image_uri(colour)) for colour in ("red", "blue"))
    assert answer(service, [red, blue]) != answer(service, [blue, red])
    alone = {colour: answer(service, [image_part(image_uri(colour))]) for colour in ("red", "blue", "lime")}
    colours = ["red", "blue", "lime"] * 4
    with concurrent.futures.ThreadPoolExecutor(len(colours)) as pool:
        together = list(pool.map(lambda colour: answer(service, [image_part(image_uri(colour))]), colours))
    assert together == [alone[colour] for colour in colours]


def test_speech_is_heard_and_becomes_part_of_the_question(service: Service, speech: bytes) -> None:
    content = [image_part(image_uri()), audio_part(speech, "mp3")]
    reply = service.client().chat.completions.create(**service.body(content))
    assert reply.choices[0].message.content
    [heard] = (reply.model_extra or {})["transcripts"]
    assert SAID in heard
    # To the model speech is its transcript, so what it answers can differ from silence only through the words.
    assert answer(service, [audio_part(speech, "mp3")]) != answer(service, [text_part("Hello"), audio_part(silence())])


def silence(seconds: float = 1.0) -> bytes:
    return wav(np.zeros(int(16_000 * seconds)))


def test_a_stream_says_the_same_as_a_whole_answer(service: Service, speech: bytes) -> None:
    content = [audio_part(speech, "mp3"), text_part("Who said that?")]
    body = service.body(content, temperature=0, max_tokens=40)
    whole = service.client().chat.completions.create(**body)
    options = {"include_usage": True}
    chunks = list(service.client().chat.completions.create(**body, stream=True, stream_options=options))
    *said, closing = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == whole.choices[0].message.content
    assert said[0].choices[0].delta.role == "assistant"
    assert SAID in said[0].model_extra["transcripts"][0]
    assert [chunk.choices[0].finish_reason for chunk in said[-2:]] == [None, whole.choices[0].finish_reason]
    assert (closing.choices, closing.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_counts_nothing_that_was_not_asked_for(service: Service) -> None:
    chunks = list(service.client().chat.completions.create(**service.body("Hello"), stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_load_generators_are_served_as_vllm_serves_them(service: Service) -> None:
    # guidellm and `vllm bench serve` look here first, and ask for answers of a length, counted as they come
    assert httpx.get(f"{service.base_url}/health").json() == {"status": "ok"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = service.body("Hello", stream=True, stream_options=options, max_completion_tokens=20)
    *said, closing = list(service.client().chat.completions.create(**body, extra_body={"ignore_eos": True}))
    counts = [chunk.usage.completion_tokens for chunk in said[1:]]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] == closing.usage.completion_tokens == 20


def test_texts_and_images_are_embedded_and_a_bad_one_is_named(service: Service) -> None:
    create = service.client().embeddings.create
    reply = create(model="tiny", input=["a red circle", image_uri("red")])
    assert [len(row.embedding) for row in reply.data] == [32, 32]
    for bad in (data_uri(b"no image"), "word " * 30):
        with pytest.raises(openai.BadRequestError) as caught:
            create(model="tiny", input=["red", bad])
        assert caught.value.param == "input.1"


def test_speech_is_written_down_whole_and_as_it_is_heard(service: Service, speech: bytes) -> None:
    create = service.client().audio.transcriptions.create
    whole = create(model="tiny", file=("a.mp3", speech))
    assert SAID in whole.text
    body = {"files": {"file": ("a.mp3", speech)}, "data": {"model": "tiny", "stream": "true"}}
    with httpx.stream("POST", f"{service.base_url}/v1/audio/transcriptions", timeout=60, **body) as left:
        assert "transcript.text.delta" in next(left.iter_lines())
    *deltas, done = create(model="tiny", file=("a.mp3", speech), stream=True)
    assert "".join(delta.delta for delta in deltas) == done.text == whole.text
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            create(model="tiny", file=("a.mp3", b"no sound"), stream=stream)
        assert (caught.value.code, caught.value.param) == ("invalid_audio", "file")


def test_readiness_is_a_real_answer_of_each_part(service: Service) -> None:
    reply = httpx.get(f"{service.base_url}/readyz", timeout=60)
    assert reply.status_code == 200
    assert reply.json() == {"status": "ready", "vision": "ready", "audio": "ready", "text": "ready"}
    assert httpx.get(f"{service.base_url}/healthz").json() == {"status": "ok"}


def test_several_answers_are_told_apart_and_counted_together(service: Service) -> None:
    body = service.body("Hello", n=3, temperature=1.0, seed=4, max_tokens=12)
    whole = service.client().chat.completions.create(**body)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 36
    *said, closing = list(
        service.client().chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    )
    streamed = dict.fromkeys(range(3), "")
    for chunk in said:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts
    assert [chunk.choices[0].index for chunk in said if chunk.choices[0].finish_reason] == [0, 1, 2]
    assert closing.usage.completion_tokens == 36


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_told_token_by_token_in_bytes(service: Service, stream: bool) -> None:
    body = service.body("Hello", max_tokens=10, logprobs=True, top_logprobs=2, temperature=0)
    if stream:
        chunks = list(service.client().chat.completions.create(**body, stream=True))
        told = [t for chunk in chunks if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        [choice] = service.client().chat.completions.create(**body).choices
        told, text = choice.logprobs.content, choice.message.content
    assert len(told) == 10
    assert bytes(byte for token in told for byte in token.bytes).decode(errors="replace") == text
    for token in told:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == token.logprob  # it was the likeliest
        assert token.top_logprobs[0].bytes == token.bytes
    plain = service.client().chat.completions.create(**service.body("Hello", max_tokens=2))
    assert plain.choices[0].logprobs is None


class Shape(BaseModel):
    """What a picture shows."""

    kind: Literal["circle", "square"]
    is_red: bool


def test_an_answer_is_of_the_class_that_was_asked_for(service: Service) -> None:
    body = service.body([image_part(image_uri("red")), text_part("What is it?")], max_tokens=100)
    parsed = service.client().chat.completions.parse(**body, response_format=Shape).choices[0].message.parsed
    assert isinstance(parsed, Shape)
    reply = service.client().chat.completions.create(
        **service.body("Hello", max_tokens=150, temperature=1.0, seed=2), response_format={"type": "json_object"}
    )
    said = reply.choices[0]
    assert said.message.content.startswith("{")
    if said.finish_reason == "stop":
        json.loads(said.message.content)


def test_what_clients_send_besides_openais_fields_is_heard(service: Service) -> None:
    body = service.body("Hello", max_tokens=20, temperature=1.5, seed=1)
    create = service.client().chat.completions.create
    greedy = answer(service, "Hello", max_tokens=20)
    assert create(**body, extra_body={"top_k": 1}).choices[0].message.content == greedy
    assert create(**body, extra_body={"min_p": 1.0}).choices[0].message.content == greedy
    assert create(**body).choices[0].message.content != greedy
    repeats = create(**service.body("Hello", max_tokens=20, temperature=0), extra_body={"repetition_penalty": 0.05})
    assert repeats.choices[0].message.content != greedy


def test_a_conversation_that_goes_on_is_not_computed_anew(service: Service) -> None:
    system = {"role": "system", "content": "You are an assistant that answers at length. " * 5}
    first = {"role": "user", "content": "Hello, who are you?"}
    create = service.client().chat.completions.create
    said = create(model="tiny", messages=[system, first], max_tokens=20, temperature=0)
    reply = {"role": "assistant", "content": said.choices[0].message.content}
    more = create(model="tiny", messages=[system, first, reply, {"role": "user", "content": "Go on."}], max_tokens=5)
    assert more.usage.prompt_tokens_details.cached_tokens >= 0.5 * said.usage.prompt_tokens


def test_a_stop_string_ends_the_answer_before_it(service: Service) -> None:
    full = answer(service, "Hello", max_tokens=20)
    stop = full.split()[2]
    reply = service.client().chat.completions.create(**service.body("Hello", temperature=0, max_tokens=20, stop=[stop]))
    assert reply.choices[0].message.content == full[: full.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer(service: Service) -> None:
    first, again, other = (
        service.client().chat.completions.create(**service.body("Hello", temperature=1, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content


def test_models_are_listed_and_described(service: Service) -> None:
    assert [model.id for model in service.client().models.list()] == ["tiny"]
    assert service.client().models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        service.client().models.retrieve("gpt-9")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_the_page_and_the_api_share_a_port(service: Service) -> None:
    page = httpx.get(service.base_url)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert httpx.get(f"{service.base_url}/healthz").json() == {"status": "ok"}
    for method, path in (("GET", "/v1/chat/completions"), ("DELETE", "/v1/models")):
        reply = httpx.request(method, service.base_url + path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (405, "method_not_allowed")
    reply = httpx.post(f"{service.base_url}/v1/images/generations")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    described = httpx.get(f"{service.base_url}/openapi.json").json()
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(described)))
    assert "ChatMessage" in references
    assert references <= set(described["components"]["schemas"])


def test_the_page_hears_and_answers(service: Service, speech: bytes, tmp_path: Any) -> None:
    recording = tmp_path / "said.mp3"
    recording.write_bytes(speech)
    page = Client(service.base_url, verbose=False, analytics_enabled=False)
    heard, answer, pace = page_answer(page, "Who?", recording)
    assert SAID in heard[1]
    assert (heard[0], answer[0], pace[0]) == ("heard", None, "print")  # an answer and not a notice
    assert "tokens" in pace[1]


def test_a_request_keeps_its_id(service: Service) -> None:
    reply = httpx.get(f"{service.base_url}/v1/models", headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"


CONTENT = "messages.0.content.0"
WHOLE_PNG = base64.b64decode(image_uri(size=(200, 200)).split(",")[1])
BAD: dict[str, tuple[Any, str | None]] = {
    "bytes that are no image": ([image_part(data_uri(b"no image"))], f"{CONTENT}.image_url"),
    "half an image": ([image_part(data_uri(WHOLE_PNG[: len(WHOLE_PNG) // 2]))], f"{CONTENT}.image_url"),
    "an empty image": ([image_part(data_uri(b""))], f"{CONTENT}.image_url"),
    "an image of too many pixels": ([image_part(image_uri(size=(12_000, 4_000)))], f"{CONTENT}.image_url"),
    "an image elsewhere": ([image_part("http://example.com/a.png")], f"{CONTENT}.image_url"),
    "a file of this machine": ([image_part("file:///etc/passwd")], f"{CONTENT}.image_url"),
    "an image that is not base64": ([image_part("data:image/png;base64,@@@@")], f"{CONTENT}.image_url"),
    "a URL that is no string": ([image_part(3)], f"{CONTENT}.image_url.url"),  # type: ignore[arg-type]
    "the second of two images": (
        [image_part(image_uri()), image_part(data_uri(b"x"))],
        "messages.0.content.1.image_url",
    ),
    "empty audio": ([audio_part(b"")], f"{CONTENT}.input_audio"),
    "garbage audio": ([audio_part(b"\0garbage" * 100)], f"{CONTENT}.input_audio"),
    "audio that is not base64": (
        [{"type": "input_audio", "input_audio": {"data": "@@@@", "format": "wav"}}],
        f"{CONTENT}.input_audio",
    ),
    "a picture as audio": ([audio_part(WHOLE_PNG)], f"{CONTENT}.input_audio"),
    "audio without speech": ([audio_part(silence())], f"{CONTENT}.input_audio"),
    "an unknown part": ([{"type": "video", "video": 1}], f"{CONTENT}.type"),
    "a part without a type": ([{"text": "Hi"}], f"{CONTENT}.type"),
    "content that is a number": (5, "messages.0.content"),
    "content that is null": (None, "messages.0.content"),
    "an empty message": ("", "messages.0.content"),
    "a conversation beyond the context": ("word " * 5_000, "messages"),
    "a conversation beyond all limits": ("x" * 200_001, "messages"),
}
BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages"),
    "messages that are a string": ({"messages": "Hi"}, "messages"),
    "a message that is a string": ({"messages": ["Hi"]}, "messages.0"),
    "a message without content": ({"messages": [{"role": "user"}]}, "messages.0.content"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages.0.role"),
    "a late system message": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Hi"}]},
        "messages.1.role",
    ),
    "a model that is a number": ({"model": 3}, "model"),
    "a temperature that is a word": ({"temperature": "hot"}, "temperature"),
    "a temperature out of range": ({"temperature": 5}, "temperature"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "half a token": ({"max_tokens": 1.5}, "max_tokens"),
    "no answers": ({"n": 0}, "n"),
    "too many answers": ({"n": 1000}, "n"),
    "a penalty out of range": ({"frequency_penalty": 3}, "frequency_penalty"),
    "a penalty that is a word": ({"presence_penalty": "much"}, "presence_penalty"),
    "a repetition penalty of nothing": ({"repetition_penalty": 0}, "repetition_penalty"),
    "a share above all": ({"min_p": 1.5}, "min_p"),
    "more tokens at least than at most": ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    "too many log-probabilities": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "the likeliest of what is not told": ({"top_logprobs": 3}, "top_logprobs"),
    "a seed without end": ({"seed": 2**70}, "seed"),
    "an unknown format": ({"response_format": {"type": "yaml"}}, "response_format.type"),
    "a schema without a name": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "shape"}}}},
        "response_format",
    ),
    "a schema without end": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"title": "x" * 60_000}}}},
        "response_format.json_schema.schema",
    ),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "too many stop strings": ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    "a stream that is a word": ({"stream": "yes"}, "stream"),
    "an unknown field": ({"tempurature": 1}, "tempurature"),
}
NOT_JSON = [b"", b"{", b"[]", b'"Hi"', b"\xff\xfe\x00", b'{"model": NaN}', b'{"model": "\\ud800"}', b"[" * 100_000]


def refused(reply: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]
    assert "Traceback" not in reply.text
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_content_that_cannot_be_used_is_refused_by_name(service: Service, case: str, stream: bool) -> None:
    content, param = BAD[case]
    refused(post(service, service.body(content, stream=stream)), 400, param)


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_fields_that_cannot_be_used_are_refused_by_name(service: Service, case: str) -> None:
    fields, param = BAD_FIELDS[case]
    error = refused(post(service, service.body("Hi", **fields)), 400, param)
    assert param in error["message"] or error["code"] == "invalid_conversation"


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(service: Service, missing: str) -> None:
    body = service.body("Hi")
    del body[missing]
    assert missing in refused(post(service, body), 400, missing)["message"]


@pytest.mark.parametrize("body", NOT_JSON, ids=range(len(NOT_JSON)))
def test_a_body_that_is_no_json_object_is_refused(service: Service, body: bytes) -> None:
    refused(post(service, body), 400, None)


def test_an_unknown_model_is_not_found(service: Service) -> None:
    with pytest.raises(openai.NotFoundError, match="ask for 'tiny'") as caught:
        service.client().chat.completions.create(**service.body("Hi", model="gpt-9"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("n_bytes", [2_000_001, 7_000_000])
def test_a_body_that_is_too_large_is_refused(service: Service, n_bytes: int) -> None:
    error = refused(post(service, service.body("x" * n_bytes)), 413, None)
    assert error["code"] == "request_too_large"


def test_after_all_that_the_service_still_answers(service: Service, speech: bytes) -> None:
    many = [content for content, _ in BAD.values()] * 2
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda content: post(service, service.body(content)), many))
    assert {reply.status_code for reply in replies} == {400}
    assert answer(service, [image_part(image_uri()), audio_part(speech, "mp3"), text_part("Still there?")])


def test_an_answer_that_takes_too_long_is_ended(hasty_service: Service) -> None:
    body = hasty_service.body("Hi", max_tokens=100_000)
    reply = post(hasty_service, body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    with pytest.raises(openai.APIError, match="longer than a request may take"):
        for _ in hasty_service.client().chat.completions.create(**body, stream=True):
            pass


def test_a_crowd_is_told_to_come_back(hasty_service: Service) -> None:
    body = hasty_service.body("Hi", max_tokens=200)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: post(hasty_service, body), range(6)))
    turned_away = [reply for reply in replies if reply.status_code == 429]
    assert 0 < len(turned_away) < len(replies)
    assert {reply.headers["retry-after"] for reply in turned_away} == {"1"}
    assert turned_away[0].json()["error"]["type"] == "rate_limit_error"


def test_a_caller_who_leaves_makes_room_at_once(hasty_service: Service) -> None:
    url = f"{hasty_service.base_url}/v1/chat/completions"
    for _ in range(3):
        with httpx.stream("POST", url, json=hasty_service.body("Hi", max_tokens=100_000, stream=True)) as reply:
            next(reply.iter_lines())
        # Only one answer is worked on at a time, and nobody waits longer than the deadline.
        assert post(hasty_service, hasty_service.body("Hi", max_tokens=2)).status_code == 200
