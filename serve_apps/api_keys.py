"""API keys: a file of hashes, and the ring that knows whose key a caller holds.

In: a key as a caller sent it. Out: the `ApiKey` it belongs to. Only sha256 of a key is kept: keys are 256 random bits,
so that a slow hash would protect nothing more. Does not know HTTP.
"""

import hashlib
import hmac
import logging
import os
import secrets
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import yaml
from filelock import FileLock
from pydantic import AfterValidator, Field, model_validator

from mmllm_core.config import StrictModel, load_config
from mmllm_core.errors import ConfigError

PREFIX = "mmllm-"
_log = logging.getLogger("ray.serve")


def _in_utc(when: datetime) -> datetime:
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


class ApiKey(StrictModel):
    """What is known of one key, and what it may do."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Names its holder in logs and metrics, and owns what is uploaded with it."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(default=None, gt=0)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    """Of prompts and answers together."""
    models: list[str] | None = None
    """Those that it may ask for; all of them if not given."""
    created: Annotated[datetime, AfterValidator(_in_utc)] | None = None
    expires: Annotated[datetime, AfterValidator(_in_utc)] | None = None

    @property
    def has_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= datetime.now(UTC)


class KeysFile(StrictModel):
    """All keys."""

    keys: list[ApiKey] = Field(default_factory=list)

    @model_validator(mode="after")
    def _keys_differ(self) -> "KeysFile":
        for field in ("id", "sha256"):
            values = [getattr(key, field) for key in self.keys]
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"{field} '{value}' is there twice")
        return self


def hashed(secret: str) -> str:
    """The hash under which a key is kept."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a file.

    Raises:
        ConfigError: it is missing, cannot be read, or is no file of keys.
    """
    return load_config(KeysFile, path).keys


def add_key(path: Path, key: ApiKey) -> str:
    """Put a new key into a file, which is made if there is none; `key.sha256` is replaced.

    Returns:
        The key itself, which is kept nowhere.

    Raises:
        ConfigError: there is a key of that id, or the file cannot be used.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    with _locked(path):
        keys = read_keys(path) if path.exists() else []
        if any(other.id == key.id for other in keys):
            raise ConfigError(f"{path}: there is a key '{key.id}' already: revoke it first, or take another name")
        _write(path, [*keys, key.model_copy(update={"sha256": hashed(secret)})])
    return secret


def remove_key(path: Path, id: str) -> None:
    """Take a key out of a file.

    Raises:
        ConfigError: there is no such key, or the file cannot be used.
    """
    with _locked(path):
        keys = read_keys(path)
        rest = [key for key in keys if key.id != id]
        if len(rest) == len(keys):
            known = ", ".join(key.id for key in keys) or "none at all"
            raise ConfigError(f"{path}: there is no key '{id}': it holds {known}")
        _write(path, rest)


class KeyRing:
    """The keys of a file as they are now.

    A file that cannot be read any more costs no one their key: the last good one holds, and the error is logged.

    Raises:
        ConfigError: the file cannot be used as it starts.
    """

    def __init__(self, path: Path):
        self._path = path
        self._seen = self._stamp()
        self._keys = read_keys(path)

    def find(self, secret: str) -> ApiKey | None:
        """The key that a caller holds, expired or not, or None; takes as long for a wrong one as for a right one."""
        self._refresh()
        presented, found = hashed(secret), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, presented):
                found = key
        return found

    def _refresh(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._keys = read_keys(self._path)
        except ConfigError as error:
            _log.error("keys are not read again, and the earlier ones hold: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _locked(path: Path) -> FileLock:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path.with_name(f".{path.name}.lock"), mode=0o600)
    except OSError as error:
        raise ConfigError(f"{path.parent}: cannot be written: {error.strerror}") from error


def _write(path: Path, keys: list[ApiKey]) -> None:
    """Replace the file at once, so that a service never reads half of it; only its owner may read it."""
    values = {"keys": [key.model_dump(mode="json", exclude_none=True) for key in keys]}
    partial = None
    try:
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # readable by its owner alone
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yaml.safe_dump(values, file, sort_keys=False)
        os.replace(partial, path)
    except OSError as error:
        if partial:
            Path(partial).unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
