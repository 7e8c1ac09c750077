"""Images by https URL in chats, by a service that trusts a test's own authority and this machine's address."""

import asyncio
import base64
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmllm_core.bundle import Bundle
from serve_apps import in_process
from serve_apps.assistant_app import Assistant
from serve_apps.image_fetch import ImageFetcher
from tests.serve_apps.certificates import Authority
from tests.serve_apps.conftest import ServeHere, Service, free_port, image_part, image_uri, text_part

pytestmark = pytest.mark.slow

HOST = "pictures.example"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path, list[bytes]]]:
    """An https server of pictures: its port, its authority's certificate, and what it was asked."""
    authority, port, asked = Authority(tmp_path_factory.mktemp("ca")), free_port(), []
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        asked.append(request.partition(b"\r\n")[0])
        body = base64.b64decode(image_uri("blue").partition(",")[2]) if b"blue" in asked[-1] else b"no image"
        head = f"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    context = authority.server_context(HOST)
    loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", port, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield port, authority.ca_file, asked
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture(scope="module")
def service(bundle: Bundle, serve_here: ServeHere, server: tuple[int, Path, list[bytes]]) -> Service:
    port, ca_file, _ = server

    class Trusting(Assistant):
        """Looks every name up here; nothing that a request or a config says can do that."""

        def __init__(self, *args: Any):
            super().__init__(*args)
            assert self.config.image_urls is not None
            trusted = ssl.create_default_context(cafile=str(ca_file))
            self._perceiver._fetcher = ImageFetcher(
                self.config.image_urls, lambda *_: ["127.0.0.1"], lambda address: address == "127.0.0.1", trusted
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "Assistant", Trusting)
        return serve_here(bundle, {"image_urls": {"ports": [port, 443]}})


def test_an_image_at_a_url_answers_as_the_image_itself(service: Service, server: tuple[int, Path, list[bytes]]) -> None:
    port, _, asked = server
    create = service.client().chat.completions.create

    def answer(url: str) -> Any:
        return create(**service.body([image_part(url), text_part("What?")], temperature=0)).choices[0].message.content

    assert answer(f"https://{HOST}:{port}/blue.png") == answer(image_uri("blue")) != answer(image_uri("red"))
    assert asked == [b"GET /blue.png HTTP/1.1"]


def test_what_is_no_image_names_its_field(service: Service, server: tuple[int, Path, list[bytes]]) -> None:
    body = service.body([text_part("What?"), image_part(f"https://{HOST}:{server[0]}/other.png")])
    reply = httpx.post(f"{service.base_url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_image", "messages.0.content.1.image_url")


def test_a_host_with_another_certificate_is_refused(service: Service, server: tuple[int, Path, list[bytes]]) -> None:
    before = list(server[2])
    body = service.body([image_part(f"https://other.example:{server[0]}/blue.png")])
    reply = httpx.post(f"{service.base_url}/v1/chat/completions", json=body, timeout=60)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_image")
    assert server[2] == before
