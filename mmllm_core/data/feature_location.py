"""Where a feature store's files lie: a local folder, or a prefix of an object store.

In: a path, or a URL such as `s3://bucket/prefix`, `gs://bucket/prefix` or `memory://prefix`. Out: whole files by
name: put, read in part, listed, deleted. Nothing is visible under its name before it is whole: a folder writes aside
and renames, an object store shows an object when its upload ends. Does not know what the files hold.

`s3` and `gs` are spoken by pyarrow's own clients, which take the usual AWS and Google credentials and the options
that Ray takes in the URL (`s3://bucket/prefix?endpoint_override=host:9000&scheme=http`). Other URLs are fsspec's.
"""

import os
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmllm_core.errors import EnvironmentLack, FeatureStoreError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Bytes = bytes | memoryview

PARTIAL = ".partial"
"""Suffix of a file that a writer has not finished."""
_ARROW_SCHEMES = ("s3", "gs", "gcs")
_URL = re.compile(r"^([a-z][a-z0-9+.-]+):/")


@dataclass(frozen=True)
class ListedFile:
    """A file as a listing shows it; `modified` in seconds since 1970."""

    name: str
    n_bytes: int
    modified: float


class FeatureLocation(Protocol):
    """Files by name, without folders below.

    Every method raises `FeatureStoreError` when the place cannot be reached.
    """

    local: bool
    """Whether files can be memory-mapped where they lie."""

    def __str__(self) -> str:
        """The location as a person wrote it."""

    def list(self) -> list[ListedFile]:
        """All files, in order of name; none if the place does not exist yet."""

    def put(self, name: str, pieces: Sequence[Bytes]) -> None:
        """Write a file that becomes visible whole.

        Raises:
            EnvironmentLack: the disk is full or the place cannot be written; nothing became visible.
        """

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """A range of a file's bytes; fewer than asked for where the file ends.

        Raises:
            FileNotFoundError: there is no such file.
        """

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    def path(self, name: str) -> Path:
        """Where a file lies; only where `local`."""


def absolute_location(location: str) -> str:
    """The location as processes that run in other folders understand it: a path becomes absolute, a URL stays."""
    return location if _URL.match(location) else str(Path(location).expanduser().absolute())


def open_location(location: str | Path) -> FeatureLocation:
    """The files at a path or URL; nothing is made or read yet.

    Raises:
        FeatureStoreError: the URL is malformed or of a kind that is not installed.
    """
    text = os.fspath(location)
    match = _URL.match(text)
    if match is None:
        return LocalFolder(Path(text).expanduser())
    if not text.startswith(f"{match[1]}://"):
        raise FeatureStoreError(f"feature store '{text}': a URL needs two slashes after '{match[1]}:'")
    if match[1] in ("file", "local"):
        return LocalFolder(Path(text.partition("://")[2]))
    return ObjectStore(text, match[1])


class LocalFolder:
    """A folder on a disk of this machine, or one that is mounted as such; made when it is first written."""

    local = True

    def __init__(self, folder: Path):
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def list(self) -> list[ListedFile]:
        found = []
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    try:
                        status = entry.stat()
                    except FileNotFoundError:  # removed while we look
                        continue
                    if entry.is_file():
                        found.append(ListedFile(entry.name, status.st_size, status.st_mtime))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreachable(self, error) from error
        return sorted(found, key=lambda file: file.name)

    def put(self, name: str, pieces: Sequence[Bytes]) -> None:
        partial = self._folder / f"{name}.{uuid.uuid4().hex[:8]}{PARTIAL}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                for piece in pieces:
                    stream.write(piece)
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(self._folder / name)
        except OSError as error:
            raise _unwritable(self, error) from error
        finally:
            with suppress(OSError):  # where the folder itself fails, that is told already
                partial.unlink(missing_ok=True)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            with (self._folder / name).open("rb") as stream:
                stream.seek(start)
                return stream.read(-1 if length is None else length)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unreachable(self, error) from error

    def delete(self, name: str) -> None:
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self, error) from error

    def path(self, name: str) -> Path:
        return self._folder / name


class ObjectStore:
    """Objects under a prefix, through fsspec's interface."""

    local = False

    def __init__(self, url: str, scheme: str):
        self._url = url
        try:
            self._fs, prefix = _arrow_filesystem(url) if scheme in _ARROW_SCHEMES else _fsspec_filesystem(url)
        except (ImportError, OSError, ValueError) as error:
            raise FeatureStoreError(f"feature store '{url}': cannot be opened: {_one_line(error)}") from error
        self._prefix = prefix.rstrip("/")

    def __str__(self) -> str:
        return self._url

    def list(self) -> list[ListedFile]:
        try:
            self._fs.invalidate_cache()
            entries = self._fs.ls(self._prefix, detail=True)
        except FileNotFoundError:  # nothing was written under this prefix yet
            return []
        except OSError as error:
            raise _unreachable(self, error) from error
        files = [
            ListedFile(entry["name"].rpartition("/")[2], int(entry["size"]), _modified(entry))
            for entry in entries
            if entry["type"] == "file"
        ]
        return sorted(files, key=lambda file: file.name)

    def put(self, name: str, pieces: Sequence[Bytes]) -> None:
        try:
            self._fs.pipe_file(self._object(name), b"".join(pieces))
        except OSError as error:
            raise _unwritable(self, error) from error

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            end = None if length is None else start + length
            return bytes(self._fs.cat_file(self._object(name), start=start or None, end=end))
        except FileNotFoundError:
            raise
        except OSError as error:
            if self._ends_before(name, start):  # S3 answers a range beyond the end with an error
                return b""
            raise _unreachable(self, error) from error

    def delete(self, name: str) -> None:
        try:
            self._fs.rm_file(self._object(name))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _unwritable(self, error) from error

    def path(self, name: str) -> Path:
        raise NotImplementedError(f"{self._url}/{name} is not on this machine")

    def _object(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _ends_before(self, name: str, start: int) -> bool:
        try:
            return bool(self._fs.size(self._object(name)) <= start)
        except OSError:
            return False


def _arrow_filesystem(url: str) -> "tuple[AbstractFileSystem, str]":
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSystem

    filesystem, prefix = FileSystem.from_uri(url)
    return ArrowFSWrapper(filesystem), prefix


def _fsspec_filesystem(url: str) -> "tuple[AbstractFileSystem, str]":
    from fsspec.core import url_to_fs

    filesystem, prefix = url_to_fs(url)
    return filesystem, str(prefix)


def _modified(entry: dict[str, Any]) -> float:
    """Time of an object's upload; each filesystem calls it something else."""
    for name in ("mtime", "LastModified", "last_modified", "created", "updated"):
        value = entry.get(name)
        if value is not None:
            return float(value.timestamp() if hasattr(value, "timestamp") else value)
    return float("inf")  # unknown: never old enough to be removed


def _unreachable(place: FeatureLocation, error: OSError) -> FeatureStoreError:
    return FeatureStoreError(f"feature store '{place}': cannot be read: {_one_line(error)}")


def _unwritable(place: FeatureLocation, error: OSError) -> EnvironmentLack:
    reason = _one_line(error)
    return EnvironmentLack(
        f"feature store '{place}': cannot be written ({reason}): free space, or point MMLLM_FEATURES elsewhere"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())
