"""A large file over HTTP that goes on where it broke off.

In: a URL and where the file shall lie. Out: the whole file and what was fetched, recorded beside it. While it comes it
is `NAME.partial`, and `NAME.partial.json` holds the validator that tells whether the server still has the same file
(RFC 9110: Range, If-Range). Does not know what the file holds.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm_core.artifact import require_free_disk
from mmllm_core.errors import EnvironmentLack, WeightsError
from mmllm_core.vision import file_sha256

if TYPE_CHECKING:
    import httpx

_TRIES = 5
"""Times in a row that a connection may fail without bringing a byte."""


@dataclass(frozen=True)
class Fetched:
    """What was downloaded; kept as `NAME.json` beside the file."""

    url: str
    size: int
    sha256: str
    validator: str | None
    """The server's strong ETag or Last-Modified; None if it gave neither."""


Progress = Callable[[int, int], None]
"""Takes bytes that are here and bytes in all."""


def download(url: str, target: Path, *, progress: Progress = lambda here, total: None, pause: float = 1.0) -> Fetched:
    """Fetch `url` to `target` unless a file is there already; run it again to go on after a failure.

    Args:
        pause: seconds before a broken connection is tried again; doubled each time that it brings nothing.

    Raises:
        WeightsError: the server cannot be reached or refuses; the message says how to place the file by hand.
        EnvironmentLack: no space for it.
    """
    if target.exists():
        return _recorded(url, target)
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        validator = _fetch(url, partial, progress, pause)
        fetched = _record(Fetched(url, _size(partial), file_sha256(partial), validator), target)
        partial.rename(target)
        _state(partial).unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentLack(f"{target}: cannot be written: {error.strerror or error}") from error
    except _Refusal as error:
        kept = f"; the {_size(partial) / 1e9:.1f} GB that came are kept" if _size(partial) else ""
        raise WeightsError(
            f"{url}: cannot be fetched ({error}){kept}: check the network and run this again, or download it by other "
            f"means and put it at {target}"
        ) from error
    return fetched


class _Refusal(Exception):
    """Why the download ends."""


def _fetch(url: str, partial: Path, progress: Progress, pause: float) -> str | None:
    """Bring `partial` to its full length, over as many connections as that takes; returns the validator."""
    import httpx

    failures, connected = 0, False
    with httpx.Client(follow_redirects=True, timeout=30.0) as client:
        while True:
            before = _size(partial)
            try:
                return _fetch_rest(client, url, partial, progress)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                connected |= not isinstance(error, httpx.ConnectError)
                final = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
                failures = 0 if _size(partial) > before else failures + 1
                if final or not connected or failures == _TRIES:
                    raise _Refusal(_reason(error)) from error
                time.sleep(pause * 2**failures)


def _fetch_rest(client: "httpx.Client", url: str, partial: Path, progress: Progress) -> str | None:
    """Append what is missing over one connection, or start over if the server has another file by now."""
    here, validator = _size(partial), _validator_of(partial, url)
    headers = {"Accept-Encoding": "identity"}
    if here and validator:  # without a validator one cannot know that the rest belongs to the same file
        headers |= {"Range": f"bytes={here}-", "If-Range": validator}
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416 and response.headers.get("Content-Range") == f"bytes */{here}":
            return validator  # all had come before the connection broke
        if response.status_code == 416:
            partial.unlink()
            return _fetch_rest(client, url, partial, progress)
        response.raise_for_status()
        resumed = response.status_code == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {here}-"):
            raise _Refusal("the server sent another range than was asked for")
        if "Content-Length" not in response.headers:
            raise _Refusal("the server does not say how long the file is")
        here = here if resumed else 0
        total = here + int(response.headers["Content-Length"])
        require_free_disk(partial, (total - here) / 1e9, f"downloading {partial.stem}")
        validator = _strong_validator(response.headers)
        _state(partial).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")
        with partial.open("ab" if resumed else "wb") as stream:
            for chunk in response.iter_bytes():  # as they arrive: what waits in a buffer is lost with the connection
                stream.write(chunk)
                here += len(chunk)
                progress(here, total)
    return validator


def _strong_validator(headers: "httpx.Headers") -> str | None:
    etag = headers.get("ETag")
    validator: str | None = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    return validator


def _state(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _validator_of(partial: Path, url: str) -> str | None:
    try:
        state = json.loads(_state(partial).read_text(encoding="utf-8"))
        return state["validator"] if state["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _recorded(url: str, target: Path) -> Fetched:
    """What is known of a file that is there; one that was placed by hand is hashed once."""
    try:
        fetched = Fetched(**json.loads(_record_path(target).read_text(encoding="utf-8")))
        if fetched.size == _size(target):
            return fetched
    except (OSError, ValueError, TypeError):
        pass
    return _record(Fetched(url, _size(target), file_sha256(target), None), target)


def _record(fetched: Fetched, target: Path) -> Fetched:
    _record_path(target).write_text(json.dumps(asdict(fetched), indent=2), encoding="utf-8")
    return fetched


def _record_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
