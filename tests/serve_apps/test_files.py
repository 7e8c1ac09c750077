"""Uploaded files on a real service, with the client that callers use."""

import concurrent.futures
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from ray import serve

from mmllm_core.bundle import Bundle
from tests.serve_apps.conftest import (
    Service,
    audio_part,
    deploy,
    image_part,
    image_uri,
    text_part,
    wav,
)

pytestmark = pytest.mark.slow

SAID = "never do it for free"
ASKED = "What is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "files"


@pytest.fixture(scope="module")
def settings(serve_port: int, folder: Path) -> dict[str, Any]:
    files = {"folder": str(folder), "max_bytes": 3_000_000, "max_file_bytes": 1_000_000, "max_files": 40}
    return {
        "http.port": serve_port,
        "ui": False,
        "ingress.num_replicas": 2,  # which share nothing but the folder
        "files": files,
        "image_urls": {},
        "limits.max_body_bytes": 2_000_000,
        "limits.max_embeddings": 20,
    }


@pytest.fixture(scope="module")
def service(bundle: Bundle, settings: dict[str, Any]) -> Service:
    return deploy(bundle, "files", "/", settings)


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """A client; what it uploaded is gone afterwards."""
    client = service.client()
    yield client
    for file in client.files.list():
        client.files.delete(file.id)


def picture(colour: str = "red", kind: str = "PNG", size: tuple[int, int] = (64, 64)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def file_part(id: str) -> dict[str, Any]:
    return {"type": "file", "file": {"file_id": id}}


def upload(client: openai.OpenAI, data: bytes, name: str = "a.png", purpose: Any = "vision") -> str:
    return client.files.create(file=(name, data), purpose=purpose).id


def answer(service: Service, *parts: dict[str, Any]) -> str:
    reply = service.client().chat.completions.create(**service.body([*parts, text_part(ASKED)], temperature=0))
    assert reply.choices[0].message.content
    return reply.choices[0].message.content


def test_an_upload_is_described_listed_given_back_and_deleted(client: openai.OpenAI) -> None:
    made = client.files.create(file=("../tmp/rot\u00e4.png", picture()), purpose="vision")
    assert (made.object, made.filename, made.purpose, made.status) == ("file", "rot\u00e4.png", "vision", "processed")
    assert made.bytes == len(picture())
    assert made.expires_at is not None
    assert client.files.retrieve(made.id) == made
    assert [file.id for file in client.files.list()] == [made.id]
    content = client.files.content(made.id)
    assert content.read() == picture()
    assert content.response.headers["content-type"] == "application/octet-stream"
    assert content.response.headers["content-disposition"].startswith("attachment")
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(made.id)
    assert caught.value.code == "file_not_found"
    assert list(client.files.list()) == []


def test_lists_come_in_pages_in_either_order(client: openai.OpenAI) -> None:
    ids = [upload(client, picture(colour)) for colour in ("red", "blue", "lime", "black", "white")]
    assert [file.id for file in client.files.list(order="asc")] == ids
    assert [file.id for file in client.files.list()] == ids[::-1]
    page = client.files.list(limit=2, order="asc")
    assert [file.id for file in page.data] == ids[:2]
    assert page.has_more
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids  # the client turns the pages
    rest = client.files.list(after=ids[3], order="asc")
    assert ([file.id for file in rest.data], rest.has_more) == ([ids[4]], False)
    assert list(client.files.list(purpose="assistants")) == []


def test_an_uploaded_image_answers_as_the_image_itself(client: openai.OpenAI, service: Service) -> None:
    red, blue = upload(client, picture("red")), upload(client, picture("blue"), purpose="user_data")
    itself = answer(service, image_part(image_uri("red")))
    assert answer(service, image_part(red)) == answer(service, file_part(red)) == itself
    assert answer(service, file_part(blue)) == answer(service, image_part(image_uri("blue"))) != itself
    mixed = answer(service, file_part(red), image_part(image_uri("blue")), image_part(red))
    sent = [image_part(image_uri(colour)) for colour in ("red", "blue", "red")]
    assert mixed == answer(service, *sent)
    stream = service.client().chat.completions.create(
        **service.body([file_part(red), text_part(ASKED)], temperature=0), stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == itself


def test_an_uploaded_sound_is_heard_once(client: openai.OpenAI, service: Service, speech: bytes, folder: Path) -> None:
    id = upload(client, speech, "said.mp3", "user_data")
    body = service.body([file_part(id), text_part("Who?")], temperature=0)
    reply = client.chat.completions.create(**body)
    [heard] = (reply.model_extra or {})["transcripts"]
    assert SAID in heard
    sent = client.chat.completions.create(**service.body([audio_part(speech, "mp3"), text_part("Who?")], temperature=0))
    assert sent.choices[0].message.content == reply.choices[0].message.content
    [transcript] = folder.glob(f"*/{id}/transcript.json")
    kept = json.loads(transcript.read_text())
    transcript.write_text(json.dumps(kept | {"text": "What is kept is what is used."}))
    again = client.chat.completions.create(**body)
    assert (again.model_extra or {})["transcripts"] == ["What is kept is what is used."]
    transcript.write_text(json.dumps(kept | {"fingerprint": "of another model"}))
    anew = client.chat.completions.create(**body)
    assert (anew.model_extra or {})["transcripts"] == [heard]
    assert json.loads(transcript.read_text()) == kept


def test_features_come_from_the_store_after_a_restart_of_everything(
    client: openai.OpenAI, bundle: Bundle, settings: dict[str, Any], service: Service, folder: Path
) -> None:
    red, blue = upload(client, picture("red")), upload(client, picture("blue"))
    of_red, of_blue = answer(service, image_part(red)), answer(service, image_part(blue))
    assert of_red != of_blue
    serve.delete("files")
    # If the service computed features anew it would see red: the picture itself stays what it was.
    [kept_of_red], [kept_of_blue] = (list(folder.glob(f"*/{id}/features")) for id in (red, blue))
    shutil.rmtree(kept_of_red)
    shutil.copytree(kept_of_blue, kept_of_red)
    deploy(bundle, "files", "/", settings)
    assert {file.id for file in client.files.list()} == {red, blue}
    assert answer(service, image_part(red)) == of_blue
    # Features of another encoder, and damaged ones, are computed anew and kept.
    for file in list(kept_of_red.iterdir()):
        file.rename(file.with_name(f"{'f' * 16}-{file.name.partition('-')[2]}"))
    assert answer(service, image_part(red)) == of_red
    assert {file.name.partition("-")[0] for file in kept_of_red.iterdir()} == {bundle.info.feature_fingerprint}
    [array] = kept_of_red.glob("*.npy")
    array.write_bytes(array.read_bytes()[:-7])
    assert answer(service, image_part(red)) == of_red


def test_a_file_lives_as_long_as_its_upload_asks(client: openai.OpenAI) -> None:
    made = client.files.create(
        file=("a.png", picture()), purpose="vision", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600


def test_there_is_room_for_so_many_and_deleting_makes_room(client: openai.OpenAI) -> None:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        ids = list(pool.map(lambda _: upload(client, picture()), range(40)))
    with pytest.raises(openai.BadRequestError) as caught:
        upload(client, picture())
    assert (caught.value.code, caught.value.param) == ("storage_full", "file")
    client.files.delete(ids[0])
    upload(client, picture())


def form(**fields: Any) -> dict[str, Any]:
    """A form with a picture, or what is given for it; None leaves a field out."""
    files = {"file": ("a.png", picture()), "purpose": (None, "vision")} | fields
    return {"files": [(name, value) for name, value in files.items() if value is not None]}


MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
BAD_UPLOADS: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "no file": (form(file=None), 400, "file"),
    "a file that is a text field": (form(file=(None, "bytes")), 400, "file"),
    "two files": ({"files": [*form()["files"], ("file", ("b.png", picture()))]}, 400, None),
    "no purpose": (form(purpose=None), 400, "purpose"),
    "another purpose": (form(purpose=(None, "fine-tune")), 400, "purpose"),
    "two purposes": ({"files": [*form()["files"], ("purpose", (None, "vision"))]}, 400, "purpose"),
    "an unknown field": (form(folder=(None, "/etc")), 400, "folder"),
    "a field that is a file": (form(file=None, purpose=("p.txt", b"vision")), 400, "purpose"),
    "a field of a megabyte": (form(purpose=(None, "x" * 1_000_000)), 400, None),
    "an empty file": (form(file=("a.png", b"")), 400, "file"),
    "a file of no known kind": (form(file=("a.png", b"#!/bin/sh")), 400, "file"),
    "a pdf": (form(file=("a.pdf", b"%PDF-1.7 ..."), purpose=(None, "user_data")), 400, "file"),
    "an svg": (form(file=("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>")), 400, "file"),
    "half a picture": (form(file=("a.png", picture("red", "PNG", (300, 300))[:200])), 400, "file"),
    "a picture of one pixel": (form(file=("a.png", picture(size=(1, 1)))), 400, "file"),
    "a picture of too many pixels": (form(file=("a.png", picture(size=(12_000, 4_000)))), 400, "file"),
    "garbage that begins as a sound": (
        form(file=("a.wav", b"OggS" + bytes(500)), purpose=(None, "user_data")),
        400,
        "file",
    ),
    "a sound to look at": (form(file=("a.wav", wav(__import__("numpy").zeros(1600)))), 400, "purpose"),
    "a large file": (form(file=("a.png", picture() + bytes(1_020_000))), 400, "file"),
    "a very large file": (form(file=("a.png", picture() + bytes(4_000_000))), 413, None),
    "a time from another day": (
        form(**{"expires_after[anchor]": (None, "last_active_at")}),
        400,
        "expires_after.anchor",
    ),
    "a time without seconds": (form(**{"expires_after[anchor]": (None, "created_at")}), 400, "expires_after.seconds"),
    "a time in words": (
        form(**{"expires_after[anchor]": (None, "created_at"), "expires_after[seconds]": (None, "soon")}),
        400,
        "expires_after.seconds",
    ),
    "a time that never comes": (
        form(**{"expires_after[anchor]": (None, "created_at"), "expires_after[seconds]": (None, "-1")}),
        400,
        "expires_after.seconds",
    ),
    "JSON": ({"json": {"file": "a", "purpose": "vision"}}, 400, None),
    "nothing": ({}, 400, None),
    "a form without a boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, None),
    "a form that is none": ({"content": b"no form", "headers": MULTIPART}, 400, None),
    "a form that never ends": (
        {"content": b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n', "headers": MULTIPART},
        400,
        "file",
    ),
    "a part without a name": (
        {"content": b"--x\r\nContent-Disposition: form-data\r\n\r\nv\r\n--x--\r\n", "headers": MULTIPART},
        400,
        None,
    ),
    "another charset": (
        {
            "content": b'--x\r\nContent-Disposition: form-data; name="\xc3\xa9"\r\n\r\nv\r\n--x--\r\n',
            "headers": {"content-type": "multipart/form-data; boundary=x; charset=undefined"},
        },
        400,
        "é",
    ),
    "bytes that are no text": (
        {
            "content": b'--x\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\nv\r\n--x--\r\n',
            "headers": MULTIPART,
        },
        400,
        "ÿþ",
    ),
    "forty fields": ({"files": [(f"f{i}", (None, "v")) for i in range(40)]}, 400, None),
}


def error_of(reply: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert error["message"]
    for inside in ("Traceback", "PIL", "starlette", "/tmp"):
        assert inside not in reply.text
    return error


@pytest.mark.parametrize("case", BAD_UPLOADS)
def test_an_upload_that_cannot_be_used_is_refused_and_nothing_of_it_stays(
    client: openai.OpenAI, service: Service, folder: Path, case: str
) -> None:
    sent, status, param = BAD_UPLOADS[case]
    error_of(httpx.post(f"{service.base_url}/v1/files", timeout=60, **sent), status, param)
    assert list(client.files.list()) == []
    assert [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"] == []


NO_ID = "file-" + "0" * 32
BAD_CHATS: dict[str, tuple[dict[str, Any], int, str]] = {
    "an id that nobody has": (image_part(NO_ID), 404, "image_url"),
    "an id that is a path": (image_part("file-../../../etc/passwd"), 404, "image_url"),
    "a file part of nobody's": (file_part(NO_ID), 404, "file.file_id"),
    "a file part that is a path": (file_part("../../etc/passwd"), 404, "file.file_id"),
    "a file part with NUL": (file_part("file-\0"), 404, "file.file_id"),
    "a file part of another kind": (file_part(3), 400, "file.file_id"),  # type: ignore[arg-type]
    "a file part with data": ({"type": "file", "file": {"file_data": "data:;base64,AA=="}}, 400, "file.file_id"),
    "a file part without a file": ({"type": "file"}, 400, "file"),
    "a URL without TLS": (image_part("http://example.com/a.png"), 400, "image_url"),
    "a URL of this machine": (image_part("https://localhost:8000/healthz"), 400, "image_url"),
    "a URL of this machine by number": (image_part("https://127.0.0.1/"), 400, "image_url"),
    "a URL with a password": (image_part("https://a:b@example.com/"), 400, "image_url"),
    "a URL of an odd port": (image_part("https://example.com:6379/"), 400, "image_url"),
    "a URL of a host that is none": (image_part("https://pictures.invalid/a.png"), 400, "image_url"),
    "a URL of clouds' secrets": (image_part("https://169.254.169.254/latest/meta-data"), 400, "image_url"),
    "a URL of files": (image_part("file:///etc/passwd"), 400, "image_url"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_what_a_chat_names_and_may_not_have_is_refused(service: Service, case: str) -> None:
    part, status, param = BAD_CHATS[case]
    reply = httpx.post(f"{service.base_url}/v1/chat/completions", json=service.body([part]), timeout=60)
    error_of(reply, status, f"messages.0.content.0.{param}")


def test_a_sound_is_no_image(client: openai.OpenAI, service: Service, speech: bytes) -> None:
    id = upload(client, speech, "said.mp3", "user_data")
    reply = httpx.post(f"{service.base_url}/v1/chat/completions", json=service.body([image_part(id)]), timeout=60)
    assert "sound" in error_of(reply, 400, "messages.0.content.0.image_url")["message"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=10001", "limit"),
        ("order=up", "order"),
        (f"after={NO_ID}", "after"),
        ("after=../x", "after"),
        ("purpose=batch", "purpose"),
        ("folder=/", "folder"),
    ],
)
def test_a_list_that_cannot_be_is_refused(service: Service, query: str, param: str) -> None:
    error_of(httpx.get(f"{service.base_url}/v1/files?{query}"), 404 if param == "after" else 400, param)


@pytest.mark.parametrize("id", [NO_ID, "x", "file-..", "..%2f..%2fetc%2fpasswd", "file-%00", "%2e%2e", ".lock"])
@pytest.mark.parametrize(("method", "rest"), [("GET", ""), ("DELETE", ""), ("GET", "/content")])
def test_a_file_that_is_not_there_is_not_found(service: Service, id: str, method: str, rest: str) -> None:
    reply = httpx.request(method, f"{service.base_url}/v1/files/{id}{rest}")
    assert reply.status_code == 404, reply.text
    assert reply.json()["error"]["code"] in ("file_not_found", "not_found")


def test_the_api_describes_files_and_embeddings(service: Service) -> None:
    described = httpx.get(f"{service.base_url}/openapi.json").json()
    assert set(described["paths"]["/v1/files"]) == {"get", "post"}
    assert set(described["paths"]["/v1/files/{file_id}"]) == {"get", "delete"}
    form_of_it = described["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form_of_it["required"] == ["file", "purpose"]
    assert "FileContent" in described["components"]["schemas"]
