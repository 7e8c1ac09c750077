"""The door before an app of its own, in this process: who comes in, and what is turned away."""

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from mmllm_core.errors import ConfigError
from serve_apps.access import Door, caller_of
from serve_apps.access_config import AccessConfig, require_keys_unless_loopback
from serve_apps.api_keys import ApiKey, KeyRing, add_key, remove_key
from serve_apps.config_files import load_serve_config
from serve_apps.http_errors import answer_errors, answer_unknown_paths

LOCAL = "http://127.0.0.1:8000"
pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def an_app() -> FastAPI:
    app = FastAPI()
    answer_errors(app)

    @app.get("/healthz")
    async def healthz() -> str:
        return "ok"

    @app.get("/page")
    async def page(request: Request) -> str:
        return caller_of(request).owner

    @app.get("/v1/who")
    async def who(request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        return {"owner": caller.owner, "may": caller.allowed(["a", "b"])}

    @app.post("/v1/echo")
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    @app.post("/v1/spend")
    async def spend(request: Request) -> str:
        caller_of(request).spend(100)
        return "spent"

    @app.post("/page")
    async def post_page(request: Request) -> Response:
        return Response(await request.body())

    @app.get("/v1/stream")
    async def stream() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            for i in range(3):
                yield b"%d" % i

        return StreamingResponse(pieces())

    answer_unknown_paths(app)
    return app


def client(keys_file: Path | None = None, base_url: str = LOCAL, **overrides: Any) -> httpx.AsyncClient:
    config = load_serve_config("embedded", {"access.keys_file": keys_file and str(keys_file)} | overrides)
    ring = KeyRing(keys_file) if keys_file else None
    return httpx.AsyncClient(transport=httpx.ASGITransport(Door(an_app(), config, ring)), base_url=base_url)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def a_key(path: Path, id: str = "alice", **fields: Any) -> dict[str, str]:
    secret = add_key(path, ApiKey.model_validate({"id": id, "sha256": "0" * 64} | fields))
    return {"authorization": f"Bearer {secret}"}


def refused(reply: httpx.Response, status: int, code: str | None) -> str:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return str(error["message"])


async def test_every_route_but_health_wants_a_key(keys: Path) -> None:
    headers = a_key(keys)
    async with client(keys) as ask:
        assert (await ask.get("/healthz")).status_code == 200
        for path in ("/v1/who", "/v1/nothing", "/page", "/docs", "/openapi.json", "/v1", "/healthz/", "//healthz"):
            reply = await ask.get(path)
            refused(reply, 401, "invalid_api_key")
            assert reply.headers["www-authenticate"]
        assert (await ask.get("/v1/who", headers=headers)).json()["owner"] == "alice"
        assert (
            await ask.get("/v1/who", headers={"authorization": "bearer  " + headers["authorization"][7:]})
        ).is_success


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic Og==", "Basic !!", "Token x", "Bearer \xff", "mmllm-x"]
)
async def test_other_credentials_are_refused(keys: Path, value: str) -> None:
    a_key(keys)
    async with client(keys) as ask:
        headers = {"authorization": value.encode("latin-1")}
        refused(await ask.get("/v1/who", headers=headers), 401, "invalid_api_key")  # type: ignore[arg-type]
        refused(await ask.get("/page", headers=headers), 401, "invalid_api_key")  # type: ignore[arg-type]


async def test_a_key_as_a_password_opens_the_page_and_not_the_api(keys: Path) -> None:
    secret = a_key(keys)["authorization"][7:]
    headers = {"authorization": "Basic " + base64.b64encode(f"me:{secret}".encode()).decode()}
    async with client(keys) as ask:
        assert (await ask.get("/page", headers=headers)).json() == "alice"
        refused(await ask.get("/v1/who", headers=headers), 401, "invalid_api_key")
        elsewhere = headers | {"origin": "https://evil.example"}
        refused(await ask.get("/page", headers=elsewhere), 403, "forbidden_origin")
        assert (await ask.get("/page", headers=headers | {"origin": LOCAL})).is_success


async def test_a_key_that_is_revoked_or_over_opens_nothing(keys: Path) -> None:
    alice, old = a_key(keys), a_key(keys, "old", expires="2020-01-01")
    async with client(keys) as ask:
        assert "expired" in refused(await ask.get("/v1/who", headers=old), 401, "invalid_api_key")
        assert (await ask.get("/v1/who", headers=alice)).is_success
        remove_key(keys, "alice")
        refused(await ask.get("/v1/who", headers=alice), 401, "invalid_api_key")


async def test_a_key_may_be_for_some_models(keys: Path) -> None:
    headers = a_key(keys, models=["b"])
    async with client(keys) as ask:
        assert (await ask.get("/v1/who", headers=headers)).json()["may"] == ["b"]


async def test_limits_are_told_and_kept(keys: Path) -> None:
    few, short = a_key(keys, "few", requests_per_minute=2), a_key(keys, "short", tokens_per_minute=50)
    async with client(keys) as ask:
        replies = [await ask.get("/v1/who", headers=few) for _ in range(3)]
        assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["1", "0", "0"]
        assert "no requests left" in refused(replies[2], 429, "rate_limit_exceeded")
        assert 25 <= int(replies[2].headers["retry-after"]) <= 30
        assert (await ask.get("/page", headers=few)).is_success  # its many files are no requests of the API
        assert (await ask.post("/v1/spend", headers=short)).is_success
        refused(await ask.post("/v1/spend", headers=short), 429, "rate_limit_exceeded")


async def test_without_keys_only_this_machine_is_answered() -> None:
    async with client() as ask:
        assert (await ask.get("/v1/who")).json() == {"owner": "", "may": ["a", "b"]}
        for host in ("localhost:8000", "[::1]:8000", "127.0.0.2"):
            assert (await ask.get("/v1/who", headers={"host": host})).is_success
        for host in (
            "evil.example",
            "127.0.0.1.evil.example",
            "127.0.0.1@evil.example",
            "",
            "localhost.evil",
            "0",
            "[",
        ):
            refused(await ask.get("/v1/who", headers={"host": host}), 403, "forbidden_host")


async def test_pages_of_other_origins_are_turned_away_unless_they_are_named() -> None:
    async with client() as ask:
        for origin in (
            "https://evil.example",
            "null",
            "http://127.0.0.1:9000",
            "http://localhost:8000",
            "http://[x",
            "\xff",
        ):
            headers = {"origin": origin.encode("latin-1")}
            refused(await ask.post("/v1/echo", headers=headers), 403, "forbidden_origin")  # type: ignore[arg-type]
        assert (await ask.post("/v1/echo", headers={"origin": LOCAL})).is_success
    async with client(**{"access.cors_origins": ["https://good.example"]}) as ask:
        assert (await ask.post("/v1/echo", headers={"origin": "https://good.example"})).is_success


async def test_methods_are_answered_in_openais_way() -> None:
    async with client() as ask:
        for method, path in (
            ("GET", "/v1/echo"),
            ("DELETE", "/v1/who"),
            ("OPTIONS", "/v1/who"),
            ("PATCH", "/v1/spend"),
        ):
            reply = await ask.request(method, path)
            refused(reply, 405, "method_not_allowed")
            assert reply.headers["allow"] == ("POST" if path in ("/v1/echo", "/v1/spend") else "GET")
        refused(await ask.get("/v1/nothing"), 404, "not_found")
        head, get = await ask.head("/v1/who"), await ask.get("/v1/who")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"]
        assert (await ask.head("/v1/nothing")).status_code == 404


async def test_headers_that_are_too_large_are_refused() -> None:
    async with client(**{"limits.max_header_bytes": 2_000}) as ask:
        refused(await ask.get("/v1/who", headers={"x-big": "x" * 3_000}), 431, "headers_too_large")
        refused(await ask.get("/v1/who", headers={f"x-{i}": "x" for i in range(999)}), 431, "headers_too_large")
        refused(await ask.get("/v1/who?" + "x" * 3_000), 431, "headers_too_large")
        assert (await ask.get("/v1/who", headers={"x-big": "x" * 1_000})).is_success


async def trickle(*pieces: bytes, pause_s: float) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(pause_s)


async def test_a_body_that_trickles_in_is_refused_and_one_in_time_is_not() -> None:
    async with client(**{"limits.body_timeout_s": 0.3}) as ask:
        slow = await ask.post("/v1/echo", content=trickle(b"a", b"b", b"c", pause_s=5))
        refused(slow, 408, "request_timeout")
        assert slow.headers["connection"] == "close"
        assert (await ask.post("/v1/echo", content=trickle(b"a", b"b", pause_s=0.01))).content == b"ab"
        assert (await ask.get("/v1/stream")).content == b"012"


async def test_a_body_for_the_page_is_bounded_too() -> None:
    async with client(**{"limits.max_body_bytes": 1_000}) as ask:
        refused(await ask.post("/page", content=b"x" * 1_001), 413, "request_too_large")
        refused(await ask.post("/page", content=trickle(*[b"x" * 100] * 11, pause_s=0)), 413, "request_too_large")
        assert (await ask.post("/page", content=b"x" * 1_000)).content == b"x" * 1_000


async def test_websockets_are_closed_before_they_open() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    door = Door(an_app(), load_serve_config("embedded"), None)
    await door({"type": "websocket", "path": "/v1/who", "headers": []}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.com", "localhost.example.com"])
def test_serving_others_without_keys_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mmllm keys create"):
        load_serve_config("embedded", {"http.host": host})
    config = load_serve_config("embedded", {"http.host": host, "access.keys_file": "keys.yaml"})
    assert config.access.keys_file == Path.cwd() / "keys.yaml"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_serving_this_machine_needs_no_keys(host: str) -> None:
    assert load_serve_config("embedded", {"http.host": host}).access == AccessConfig()
    require_keys_unless_loopback(None, AccessConfig())


@pytest.mark.parametrize("origin", ["*", "example.com", "https://a.example/path", "https://*"])
def test_an_origin_is_named_whole(origin: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins"):
        load_serve_config("embedded", {"access.cors_origins": [origin]})
