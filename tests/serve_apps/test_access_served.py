"""Keys on a real service that others can reach: with the client that callers use, over the network's own address."""

import base64
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gradio_client import Client

from mmllm_core.bundle import Bundle
from serve_apps.api_keys import ApiKey, add_key, remove_key
from serve_apps.limits import Limits
from tests.serve_apps.conftest import SERVE_AND_LONG_HAPROXY, TEXT_ALONE, Proxy, Service, deploy, own_serve, page_answer

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("proxy", SERVE_AND_LONG_HAPROXY, indirect=True, scope="module")]


LIMITS = Limits(body_timeout_s=1.5)


@pytest.fixture(scope="module")
def serve_port(proxy: Proxy) -> Iterator[int]:
    with own_serve("0.0.0.0", proxy=proxy, limits=LIMITS) as port:
        yield port


@dataclass(frozen=True)
class Keyed:
    service: Service
    file: Path

    def key(self, id: str, **fields: Any) -> str:
        return add_key(self.file, ApiKey.model_validate({"id": id, "sha256": "0" * 64} | fields))

    def ask(self, key: str, **fields: Any) -> Any:
        return self.service.client(key).chat.completions.create(**self.service.body("Hello", **fields))


@pytest.fixture(scope="module")
def keyed(bundle: Bundle, serve_port: int, tmp_path_factory: pytest.TempPathFactory) -> Keyed:
    file = tmp_path_factory.mktemp("access") / "keys.yaml"
    add_key(file, ApiKey(id="first", sha256="0" * 64))
    overrides = {
        "http.host": "0.0.0.0",
        "http.port": serve_port,
        "access.keys_file": str(file),
        "access.cors_origins": ["https://chat.example"],
        "limits.body_timeout_s": LIMITS.body_timeout_s,
        "ui": True,
    }
    return Keyed(deploy(bundle, "keyed", "/", TEXT_ALONE | overrides), file)


def test_the_client_is_answered_with_a_key_and_not_without(keyed: Keyed) -> None:
    key = keyed.key("alice")
    assert keyed.ask(key).choices[0].message.content
    assert [model.id for model in keyed.service.client(key).models.list()] == ["tiny"]
    with pytest.raises(openai.AuthenticationError) as caught:
        keyed.ask("mmllm-wrong")
    assert caught.value.code == "invalid_api_key"
    base = keyed.service.base_url
    for path in ("/", "/v1/models", "/metrics", "/docs", "/openapi.json", "/gradio_api/info", "/config"):
        assert httpx.get(base + path).status_code == 401, path
    assert httpx.post(f"{base}/gradio_api/upload", files={"files": b"x"}).status_code == 401
    assert httpx.get(f"{base}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{base}/readyz", timeout=60).json()["status"] == "ready"


def test_a_key_of_other_models_finds_none(keyed: Keyed) -> None:
    key = keyed.key("other", models=["large"])
    client = keyed.service.client(key)
    assert list(client.models.list()) == []
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tiny")
    with pytest.raises(openai.NotFoundError, match="none of those that are served") as caught:
        keyed.ask(key)
    assert caught.value.code == "model_not_found"


def test_every_route_that_goes_by_model_keeps_to_the_list(keyed: Keyed) -> None:
    """A route that is new and takes a model has to be added here, and to ask `caller_of(request).allowed`."""
    headers = {"authorization": f"Bearer {keyed.key('listed', models=['large'])}"}
    base = keyed.service.base_url
    spoken: dict[str, Any] = {"files": {"file": ("a.wav", b"RIFF")}, "data": {"model": "tiny"}}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"json": keyed.service.body("Hi")},
        "/v1/embeddings": {"json": {"model": "tiny", "input": "Hi"}},
        "/v1/audio/transcriptions": spoken,
        "/v1/audio/translations": spoken,
    }
    described = httpx.get(f"{base}/openapi.json", headers=headers).json()
    for path, operations in described["paths"].items():
        for content in operations.get("post", {}).get("requestBody", {}).get("content", {}).values():
            if "model" in json.dumps(content):
                assert path in bodies, path
    for path, body in bodies.items():
        reply = httpx.post(base + path, headers=headers, **body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


def test_limits_hold_and_say_when_to_come_back(keyed: Keyed) -> None:
    key = keyed.key("few", requests_per_minute=2)
    replies = [keyed.service.client(key).models.with_raw_response.list() for _ in range(2)]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["1", "0"]
    with pytest.raises(openai.RateLimitError) as caught:
        keyed.ask(key)
    assert caught.value.code == "rate_limit_exceeded"
    assert 20 <= int(caught.value.response.headers["retry-after"]) <= 30


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_whole_and_streamed_answers_are_charged(keyed: Keyed, stream: bool) -> None:
    key = keyed.key(f"short-{stream}", tokens_per_minute=20)
    reply = keyed.ask(key, max_tokens=40, stream=stream)
    assert list(reply)
    with pytest.raises(openai.RateLimitError, match="no tokens left"):
        keyed.ask(key)


def test_a_key_that_is_revoked_is_refused_from_then_on(keyed: Keyed) -> None:
    key = keyed.key("brief")
    assert keyed.ask(key)
    remove_key(keyed.file, "brief")
    with pytest.raises(openai.AuthenticationError):
        keyed.ask(key)


def test_the_page_asks_with_the_key_that_opened_it(keyed: Keyed) -> None:
    base, key = keyed.service.base_url, keyed.key("visitor")
    headers = {"authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}
    page = httpx.get(base, headers=headers)
    assert page.headers["content-type"].startswith("text/html")
    client = Client(base, headers=headers, verbose=False, analytics_enabled=False)
    assert [kind for kind, _ in page_answer(client, "Hello")] == [None, "print"]  # an answer and not a notice


def test_named_origins_may_ask_and_others_not(keyed: Keyed) -> None:
    url = f"{keyed.service.base_url}/v1/chat/completions"
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    allowed = httpx.options(url, headers=asked | {"origin": "https://chat.example"})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    refused = httpx.options(url, headers=asked | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers


def test_a_body_that_trickles_in_is_ended(keyed: Keyed) -> None:
    key, port = keyed.key("slow"), int(keyed.service.base_url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as caller:
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", "Content-Length: 500"]
        caller.sendall("\r\n".join([*head, "", ""]).encode())
        caller.settimeout(0.3)
        began, reply = time.monotonic(), b""
        while time.monotonic() - began < 20 and not reply:
            try:
                caller.sendall(b" ")
                reply = caller.recv(4096)
            except TimeoutError:
                continue
        caller.settimeout(5)
        while piece := caller.recv(4096):  # until the service closes
            reply += piece
    assert reply.startswith(b"HTTP/1.1 408")
    assert b'"code":"request_timeout"' in reply


def test_without_keys_it_does_not_start_where_others_reach_it(bundle: Bundle, keyed: Keyed) -> None:
    """As from a Serve config file, whose own host the config knows nothing of."""
    from ray import serve

    from serve_apps.builder import ServeArgs, app

    application = app(ServeArgs(config="embedded", bundle=bundle.folder))
    serve.delete("keyed")
    with pytest.raises(RuntimeError):
        serve.run(application, name="open", route_prefix="/open")
    said = serve.status().applications["open"].deployments["Assistant"].message
    assert "access.keys_file is not set" in said
    serve.delete("open")
