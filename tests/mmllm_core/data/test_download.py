"""Downloads over a real HTTP server on this machine that cuts connections, changes its file and refuses."""

import hashlib
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mmllm_core.data import download as module
from mmllm_core.data.download import download
from mmllm_core.errors import EnvironmentLack, WeightsError

CONTENT = random.Random(0).randbytes(300_000)


@dataclass
class Site:
    """What the server serves and how it behaves; `requests` holds the Range header of each request."""

    content: bytes = CONTENT
    etag: str | None = '"one"'
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which each of the first connections breaks."""
    statuses: list[int] = field(default_factory=list)
    """Statuses that the first requests get instead of the file."""
    ranges: bool = True
    length: bool = True
    requests: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def site() -> Iterator[Site]:
    served = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            served.requests.append(asked)
            if served.statuses:
                self.send_error(served.statuses.pop(0))
                return
            start = 0
            if asked and served.ranges and self.headers.get("If-Range") == served.etag:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(served.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(served.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = served.content[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}")
            if served.etag:
                self.send_header("ETag", served.etag)
            if served.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: served.cut_after.pop(0)] if served.cut_after else body)
            self.wfile.flush()
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}/train2017.zip"
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "zips" / "train2017.zip"


def fetch(site: Site, target: Path) -> module.Fetched:
    return download(site.url, target, pause=0.0)


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_a_file_comes_whole_and_what_it_was_is_recorded(site: Site, target: Path) -> None:
    told: list[tuple[int, int]] = []
    fetched = download(site.url, target, progress=lambda here, total: told.append((here, total)))
    assert target.read_bytes() == CONTENT
    assert fetched.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert fetched.validator == '"one"'
    assert json.loads(target.with_name("train2017.zip.json").read_text())["size"] == len(CONTENT)
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert leftovers(target) == ["train2017.zip", "train2017.zip.json"]


def test_a_cut_connection_goes_on_where_it_broke(site: Site, target: Path) -> None:
    site.cut_after = [100_000, 50_000]
    fetch(site, target)
    assert target.read_bytes() == CONTENT
    assert site.requests == [None, "bytes=100000-", "bytes=150000-"]


def test_a_second_run_goes_on_where_the_first_ended(site: Site, target: Path) -> None:
    site.cut_after = [100_000, *[0] * 5]
    with pytest.raises(WeightsError, match="are kept"):
        fetch(site, target)
    assert not target.exists()
    site.requests.clear()
    fetch(site, target)
    assert target.read_bytes() == CONTENT
    assert site.requests == ["bytes=100000-"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(site: Site, target: Path) -> None:
    site.cut_after = [100_000, *[0] * 5]
    with pytest.raises(WeightsError):
        fetch(site, target)
    site.content, site.etag = CONTENT[::-1], '"two"'
    fetch(site, target)
    assert target.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("change", [{"ranges": False}, {"etag": None}, {"etag": 'W/"weak"'}])
def test_without_ranges_or_a_strong_validator_it_starts_over(
    site: Site, target: Path, change: dict[str, object]
) -> None:
    for name, value in change.items():
        setattr(site, name, value)
    site.cut_after = [100_000]
    fetch(site, target)
    assert target.read_bytes() == CONTENT


def test_what_broke_after_the_last_byte_is_whole(site: Site, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("train2017.zip.partial").write_bytes(CONTENT)
    state = {"url": site.url, "validator": site.etag}
    target.with_name("train2017.zip.partial.json").write_text(json.dumps(state))
    fetch(site, target)
    assert target.read_bytes() == CONTENT
    assert site.requests == [f"bytes={len(CONTENT)}-"]


def test_a_partial_of_another_url_is_not_gone_on_with(site: Site, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("train2017.zip.partial").write_bytes(b"x" * 1000)
    state = {"url": "http://elsewhere/", "validator": site.etag}
    target.with_name("train2017.zip.partial.json").write_text(json.dumps(state))
    fetch(site, target)
    assert target.read_bytes() == CONTENT


def test_a_server_that_is_briefly_ill_is_asked_again(site: Site, target: Path) -> None:
    site.statuses = [503, 500]
    fetch(site, target)
    assert target.read_bytes() == CONTENT


def test_a_file_that_is_there_is_not_fetched(site: Site, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"placed by hand")
    assert fetch(site, target).sha256 == hashlib.sha256(b"placed by hand").hexdigest()
    assert fetch(site, target).size == 14
    assert site.requests == []


@pytest.mark.parametrize(
    ("change", "named"),
    [({"statuses": [404]}, "404"), ({"statuses": [503] * 9}, "503"), ({"length": False}, "how long")],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    site: Site, target: Path, change: dict[str, object], named: str
) -> None:
    for name, value in change.items():
        setattr(site, name, value)
    with pytest.raises(WeightsError, match=named) as caught:
        fetch(site, target)
    message = str(caught.value)
    assert site.url in message
    assert str(target) in message
    assert "\n" not in message


def test_without_a_network_it_fails_at_once(target: Path) -> None:
    with pytest.raises(WeightsError, match="check the network") as caught:
        download("http://127.0.0.1:9/train2017.zip", target, pause=60.0)
    assert f"put it at {target}" in str(caught.value)


def test_a_disk_too_small_is_told_before_the_first_byte(
    site: Site, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(EnvironmentLack, match="free space"):
        fetch(site, target)
    assert not target.with_name("train2017.zip.partial").exists()
