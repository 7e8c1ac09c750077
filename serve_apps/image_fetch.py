"""Images of other servers: an https URL that a stranger gave -> bytes, without becoming the stranger's hands.

In: a URL. Out: the bytes of an answer that calls itself an image. The host is looked up once, and only if every address
it has is public is one of them connected to, that very address, with TLS for the host's name. No redirects, proxies,
cookies or credentials; few ports; bounds on bytes and time. Does not decode images.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from mmllm_core.errors import ImageError
from serve_apps.files_config import ImageUrlsConfig
from serve_apps.public_address import is_public

Resolver = Callable[[str, int], Sequence[str]]
"""Host and port -> addresses; may block, and raises OSError where there are none."""
MAX_URL_CHARS = 2048


def resolve_host(host: str, port: int) -> list[str]:
    """Addresses of a host, as the system's resolver orders them.

    Raises:
        OSError: it has none.
    """
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class ImageFetcher:
    """Fetches images.

    Args:
        resolve, may_connect, trusted: how names are looked up, which addresses may be connected to, and whose
            certificates count. What is served keeps the defaults, which neither config nor request can change.
    """

    def __init__(
        self,
        config: ImageUrlsConfig,
        resolve: Resolver = resolve_host,
        may_connect: Callable[[str], bool] = is_public,
        trusted: ssl.SSLContext | None = None,
    ):
        self._config = config
        self._resolve = resolve
        self._may_connect = may_connect
        self._trusted = trusted or httpx.create_ssl_context()
        self._looking_up = ThreadPoolExecutor(max_workers=config.max_fetches, thread_name_prefix="resolve-host")
        self._turns = asyncio.Semaphore(config.max_fetches)

    async def fetch(self, url: str, param: str) -> bytes:
        """The bytes at a URL.

        Args:
            param: the request field that the URL came from, for the error.

        Raises:
            ImageError: the URL is not fetched, or what it leads to is no image that may be had.
        """
        parsed = self._parse(url, param)
        port = _port(parsed)
        async with self._turns:
            try:
                async with asyncio.timeout(self._config.timeout_s):
                    address = await self._address(parsed.host, port, param)
                    return await self._get(parsed, address, port, param)
            except TimeoutError:
                raise ImageError(
                    f"the image did not come within {self._config.timeout_s:g} seconds: send it inside the request",
                    param,
                ) from None
            except (httpx.HTTPError, httpx.InvalidURL, OSError):  # its words are of the inside of our network
                raise ImageError(
                    "the image's server could not be reached over https: check the URL, or send the image itself", param
                ) from None

    def _parse(self, url: str, param: str) -> httpx.URL:
        if len(url) > MAX_URL_CHARS or not url.isascii() or not url.isprintable() or set(url) & set(' "<>\\^`{|}'):
            raise ImageError(f"the URL must be at most {MAX_URL_CHARS} plain characters, others percent-encoded", param)
        try:
            parsed = httpx.URL(url)
            host = parsed.raw_host.decode("ascii")
        except (httpx.InvalidURL, ValueError):
            raise ImageError(
                "the URL cannot be read: give one such as https://example.com/picture.png", param
            ) from None
        if parsed.scheme != "https":
            raise ImageError("only https URLs are fetched", param)
        if parsed.userinfo:
            raise ImageError("the URL holds a user's name or password: such URLs are not fetched", param)
        if not host or "." not in host.strip(".") or _is_address(host):
            raise ImageError("the URL must name a host such as example.com", param)
        if _port(parsed) not in self._config.ports:
            allowed = ", ".join(str(port) for port in self._config.ports)
            raise ImageError(f"images are not fetched from port {parsed.port}: only from {allowed}", param)
        return parsed

    async def _address(self, host: str, port: int, param: str) -> str:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._looking_up, self._resolve, host, port)
        except (OSError, UnicodeError):
            found = []
        if not found or not all(self._may_connect(address) for address in found):
            raise ImageError("the URL's host has no public address: send the image inside the request", param)
        return found[0]

    async def _get(self, url: httpx.URL, address: str, port: int, param: str) -> bytes:
        host = url.raw_host.decode("ascii")
        headers = {
            "host": host if port == 443 else f"{host}:{port}",
            "accept": "image/*",
            "accept-encoding": "identity",
            "user-agent": "mmllm",
        }
        pinned = url.copy_with(host=address, port=port, fragment=None)
        transport = httpx.AsyncHTTPTransport(verify=self._trusted, trust_env=False, retries=0)
        async with (
            httpx.AsyncClient(
                transport=transport, trust_env=False, follow_redirects=False, timeout=self._config.timeout_s
            ) as client,
            client.stream("GET", pinned, headers=headers, extensions={"sni_hostname": host}) as reply,
        ):
            if reply.is_redirect:
                raise ImageError("the URL leads to another one: give the image's own", param)
            if reply.status_code != 200:
                raise ImageError(f"the image's server answered with status {reply.status_code}", param)
            kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
            if not kind.startswith("image/") or reply.headers.get("content-encoding", "identity") != "identity":
                raise ImageError("the URL does not lead to an image: its server says that it is something else", param)
            return await self._read(reply, param)

    async def _read(self, reply: httpx.Response, param: str) -> bytes:
        most = self._config.max_bytes
        told = reply.headers.get("content-length", "0")
        pieces: list[bytes] = []
        n_bytes = int(told) if told.isdecimal() and len(told) < 20 else 0
        if n_bytes <= most:
            n_bytes = 0
            async for piece in reply.aiter_raw():
                n_bytes += len(piece)
                if n_bytes > most:
                    break
                pieces.append(piece)
        if n_bytes > most:
            raise ImageError(f"the image is larger than the {most} bytes that are fetched: send a smaller one", param)
        return b"".join(pieces)


def _port(url: httpx.URL) -> int:
    return 443 if url.port is None else url.port


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.replace(".", "").isdecimal()
    return True
