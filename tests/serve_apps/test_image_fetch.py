"""Images by URL: what is fetched, from whom, and what never leaves."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mmllm_core.errors import ImageError
from serve_apps.files_config import ImageUrlsConfig
from serve_apps.image_fetch import ImageFetcher
from serve_apps.public_address import is_public
from tests.serve_apps.certificates import Authority
from tests.serve_apps.conftest import image_uri

PNG = base64.b64decode(image_uri().partition(",")[2])
HOST = "pictures.example"
OK = "HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


class Server:
    """A TLS server on this machine that answers every request alike, and notes what it was asked."""

    def __init__(self, answer: bytes, pause_s: float = 0.0):
        self.requests: list[bytes] = []
        self.connections = 0
        self.port = 0
        self._answer = answer
        self._pause_s = pause_s

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))
        try:
            for start in range(0, len(self._answer), 64 if self._pause_s else len(self._answer)):
                writer.write(self._answer[start : start + (64 if self._pause_s else len(self._answer))])
                await writer.drain()
                await asyncio.sleep(self._pause_s)
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def running(server: Server, context: Any) -> AsyncIterator[Server]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()


def reply(body: bytes = PNG, head: str = OK, length: bool = True) -> bytes:
    told = f"content-length: {len(body)}\r\n" if length else ""
    return f"{head}{told}connection: close\r\n\r\n".encode() + body


def fetched(
    authority: Authority,
    answer: bytes,
    *,
    names: Sequence[str] = (HOST,),
    pause_s: float = 0.0,
    trusted: Any = None,
    addresses: Sequence[str] = ("127.0.0.1",),
    public: Sequence[str] = ("127.0.0.1",),
    path: str = "/a.png?x=1",
    **settings: Any,
) -> tuple[bytes | ImageError, Server, list[str]]:
    """What comes of one URL, what the server saw, and what names were looked up."""
    looked_up: list[str] = []

    async def scene() -> tuple[bytes | ImageError, Server]:
        async with running(Server(answer, pause_s), authority.server_context(*names)) as server:

            def resolve(host: str, port: int) -> Sequence[str]:
                looked_up.append(host)
                assert port == server.port
                return addresses

            config = ImageUrlsConfig(**({"ports": (server.port,), "timeout_s": 5} | settings))
            context = authority.client_context() if trusted is None else trusted()
            fetcher = ImageFetcher(config, resolve, lambda address: address in public, context)
            try:
                return await fetcher.fetch(f"https://{HOST}:{server.port}{path}", "where"), server
            except ImageError as error:
                return error, server

    found, server = asyncio.run(scene())
    return found, server, looked_up


def refusal(found: bytes | ImageError) -> str:
    assert isinstance(found, ImageError), found
    assert found.param == "where"
    for inside in ("127.0.0.1", "Traceback", "SSL", "httpx", "Errno"):
        assert inside not in found.message
    return found.message


def test_an_image_comes_as_it_is_from_the_address_that_was_looked_up(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there, and nobody is asked
    found, server, looked_up = fetched(authority, reply())
    assert found == PNG
    assert looked_up == [HOST]
    [request] = server.requests
    assert request.startswith(b"GET /a.png?x=1 HTTP/1.1\r\n")
    assert f"host: {HOST}:{server.port}\r\n".encode() in request.lower()
    assert b"cookie" not in request.lower()
    assert b"authorization" not in request.lower()


def test_an_image_without_a_length_comes_too(authority: Authority) -> None:
    assert fetched(authority, reply(length=False))[0] == PNG


@pytest.mark.parametrize(
    ("answer", "settings", "said"),
    [
        (reply(b"", "HTTP/1.1 302 Found\r\nlocation: https://10.0.0.1/\r\n"), {}, "leads to another"),
        (reply(b"no", "HTTP/1.1 404 Not Found\r\n"), {}, "status 404"),
        (reply(b"<html>", "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\n"), {}, "not lead to an image"),
        (reply(PNG, "HTTP/1.1 200 OK\r\n"), {}, "not lead to an image"),
        (reply(PNG, OK + "content-encoding: gzip\r\n"), {}, "not lead to an image"),
        (reply(b"x" * 5000), {"max_bytes": 1000}, "larger than the 1000"),
        (reply(b"x" * 5000, length=False), {"max_bytes": 1000}, "larger than the 1000"),
        (reply(b"x", OK + "content-length: 99999999999999999999\r\n", length=False), {}, "could not be reached"),
        (reply(PNG[:10], OK + "content-length: 5000\r\n", length=False), {}, "could not be reached"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", {}, "could not be reached"),
        (b"", {}, "could not be reached"),
    ],
    ids=range(11),
)
def test_what_is_no_image_of_a_fair_size_is_refused(
    authority: Authority, answer: bytes, settings: dict[str, Any], said: str
) -> None:
    found, server, _ = fetched(authority, answer, **settings)
    assert said in refusal(found)
    assert server.connections == 1


def test_a_server_that_dribbles_is_not_waited_for(authority: Authority) -> None:
    found, _, _ = fetched(authority, reply(b"x" * 20_000), pause_s=0.05, timeout_s=0.5)
    assert "did not come within 0.5 seconds" in refusal(found)


@pytest.mark.parametrize("names", [("other.example",), ("127.0.0.1",)])
def test_a_certificate_for_another_name_is_not_taken(authority: Authority, names: tuple[str, ...]) -> None:
    found, server, _ = fetched(authority, reply(), names=names)
    assert "could not be reached" in refusal(found)
    assert server.requests == []


def test_a_certificate_of_nobodys_authority_is_not_taken(authority: Authority, tmp_path: Path) -> None:
    found, server, _ = fetched(authority, reply(), trusted=Authority(tmp_path).client_context)
    assert "could not be reached" in refusal(found)
    assert server.requests == []


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["127.0.0.1", "::1"], []])
def test_a_host_with_one_address_that_is_not_public_is_not_connected_to(
    authority: Authority, addresses: list[str]
) -> None:
    found, server, _ = fetched(authority, reply(), addresses=addresses, public=["93.184.216.34"])
    assert "no public address" in refusal(found)
    assert server.connections == 0


URLS = [
    *("http://pictures.example/a.png", "ftp://pictures.example/a.png", "https:///a.png", "https://", "https:a.png"),
    *("https://user@pictures.example/", "https://user:pw@pictures.example/", "https://localhost/", "https://intranet/"),
    *("https://127.0.0.1/", "https://[::1]/", "https://[::ffff:10.0.0.1]/", "https://2130706433/", "https://127.1/"),
    *("https://pictures.example:22/", "https://pictures.example:8443/", "https://pictures.example:0/"),
    *("https://pictures.example:99999/", "https://pictures.example/a b", "https://pictures.example/\r\nx: y"),
    *("https://pictures.example\\@127.0.0.1/", "https://bücher.example/", "https://" + "a" * 3000 + ".example/"),
    *("https://0x7f.0.0.1/", "https://pictures.example/\0", "https://[fe80::1%25eth0]/", "https://.../"),
]


@pytest.mark.parametrize("url", URLS, ids=range(len(URLS)))
def test_a_url_that_is_not_plain_https_is_refused_before_anything_happens(url: str) -> None:
    looked_up: list[str] = []

    def resolve(host: str, _: int) -> list[str]:
        looked_up.append(host)
        return []

    with pytest.raises(ImageError) as caught:
        asyncio.run(ImageFetcher(ImageUrlsConfig(), resolve).fetch(url, "where"))
    assert caught.value.param == "where"
    assert looked_up in ([], ["0x7f.0.0.1"])  # which the system may read as an address; it is not public


PRIVATE = [
    *(
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
    ),
    *("100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.19.255.255", "198.51.100.7"),
    *("203.0.113.9", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.88.99.1", "168.63.129.16"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::8.8.8.8", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "100::1"),
    *("fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1", "2001::1", "2001:10::1"),
    *("2001:db8::1", "2002:7f00:1::", "2002:0808:0808::", "3fff::1", "5f00::1", "4000::1", "2001:20::1", "2001:2::1"),
    *("", "pictures.example", "1", "0x7f000001", "127.1", "010.0.0.1", "8.8.8.8/32", "2606:4700::1111%1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_of_this_machine_of_networks_and_of_protocols_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001::1"]
)
def test_what_anybody_may_be_sent_to_is_public(address: str) -> None:
    assert is_public(address)


def test_no_more_are_fetched_at_a_time_than_are_allowed(authority: Authority) -> None:
    async def scene() -> int:
        at_once = most = 0

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.05)
            writer.write(reply())
            at_once -= 1
            writer.close()

        serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] = slow
        listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=authority.server_context(HOST))
        port = listening.sockets[0].getsockname()[1]
        config = ImageUrlsConfig(ports=(port,), max_fetches=2)
        fetcher = ImageFetcher(config, lambda *_: ["127.0.0.1"], lambda _: True, authority.client_context())
        urls = [f"https://{HOST}:{port}/{i}.png" for i in range(8)]
        assert await asyncio.gather(*(fetcher.fetch(url, "p") for url in urls)) == [PNG] * 8
        listening.close()
        return most

    assert asyncio.run(scene()) == 2
