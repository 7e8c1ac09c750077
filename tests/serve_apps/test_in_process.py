"""One process without Ray takes a picture and a voice all the way to an answer, by every route that Serve has."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mmllm_core.bundle import Bundle
from serve_apps.config_files import load_serve_config
from serve_apps.in_process import serving_in_process
from tests.serve_apps.conftest import audio_part, image_part, image_uri

SAID = "If you're good at something, never do it for free."


@pytest.fixture(scope="module")
def client(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    files = {"folder": str(tmp_path_factory.mktemp("files"))}
    config = load_serve_config("embedded", {"ui": False, "files": files, "phi.kv_cache_bytes": 20_000_000})
    with serving_in_process(bundle, config) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


def picture() -> bytes:
    return base64.b64decode(image_uri().partition(",")[2])


def asked(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": list(parts)}]} | fields


def answer(client: httpx.Client, body: dict[str, Any]) -> tuple[str, list[str]]:
    reply = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return reply["choices"][0]["message"]["content"], reply["transcripts"]


def upload(client: httpx.Client, file: tuple[str, bytes], purpose: str) -> str:
    reply = client.post("/v1/files", files={"file": file}, data={"purpose": purpose})
    return str(reply.raise_for_status().json()["id"])


def test_a_picture_and_a_voice_are_answered_whole_streamed_and_as_files(client: httpx.Client, speech: bytes) -> None:
    body = asked(image_part(image_uri()), audio_part(speech, "mp3"))
    text, heard = answer(client, body)
    assert heard == [SAID]
    assert text
    stream = client.post("/v1/chat/completions", json=body | {"stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
    uploads = {"red.png": (picture(), "vision"), "voice.mp3": (speech, "user_data")}
    ids = [upload(client, (name, data), purpose) for name, (data, purpose) in uploads.items()]
    parts = [{"type": "file", "file": {"file_id": id}} for id in ids]
    assert answer(client, asked(*parts)) == (text, heard)


def test_a_voice_is_written_down_and_a_picture_is_embedded(client: httpx.Client, speech: bytes) -> None:
    reply = client.post("/v1/audio/transcriptions", files={"file": ("a.mp3", speech)}, data={"model": "whisper-1"})
    assert reply.json()["text"] == SAID
    found = client.post("/v1/embeddings", json={"model": "tiny", "input": [image_uri(), "red"]}).json()["data"]
    assert [len(row["embedding"]) for row in found] == [32, 32]


def test_what_is_wrong_with_a_body_is_told_alike_by_every_route(client: httpx.Client, speech: bytes) -> None:
    file = {"file": ("a.mp3", speech)}
    replies = {
        "temperature": client.post("/v1/chat/completions", json=asked(image_part(image_uri()), temperature=9)),
        "input.0.image_url": client.post("/v1/embeddings", json={"model": "tiny", "input": [{"type": "image_url"}]}),
        "response_format": client.post(
            "/v1/audio/transcriptions", files=file, data={"model": "whisper-1", "response_format": "rtf"}
        ),
        "limit": client.get("/v1/files", params={"limit": 0}),
    }
    assert {reply.status_code for reply in replies.values()} == {400}
    assert [reply.json()["error"]["param"] for reply in replies.values()] == list(replies)


def test_every_part_is_ready(client: httpx.Client) -> None:
    ready = {"status": "ready", "vision": "ready", "audio": "ready", "text": "ready"}
    assert client.get("/readyz").json() == ready


def test_files_that_are_gone_are_missing_to_whoever_names_them(client: httpx.Client) -> None:
    new = upload(client, ("a.png", picture()), "vision")
    assert client.delete(f"/v1/files/{new}").json()["deleted"]
    reply = client.post("/v1/chat/completions", json=asked({"type": "file", "file": {"file_id": new}}))
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "file_not_found")
