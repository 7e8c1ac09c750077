"""Uploaded files on disk: each owner's own, within bounds, for a time.

    FOLDER/OWNER/ID/      a file (`stored_file`); OWNER is a hash, ID is random
    FOLDER/.making-...    a file that is being written
    FOLDER/.gone-...      one that is being removed
    FOLDER/.lock          held while bounds are checked and a file is added

Nothing is remembered between calls, so that any number of processes, on any machines that share the folder, see the
same files, and so does who comes after a restart. Does not know HTTP.
"""

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from mmllm_core.errors import BadInput, EnvironmentLack
from serve_apps.files_config import FilesConfig
from serve_apps.stored_file import (
    CONTENT,
    RECORD,
    FileRecord,
    HeardText,
    Kind,
    Purpose,
    Seen,
    StoredFile,
    file_missing,
    is_file_id,
    read_record,
    write_perceived,
    write_whole,
)

_MAKING, _GONE = ".making-", ".gone-"
_LEFT_OVER_S = 3600.0
"""After which what a process left half made is removed: none takes that long."""


class StorageFull(BadInput):
    """There is no room for another file."""

    code = "storage_full"


@dataclass(frozen=True)
class NewFile:
    """A file to keep, and what was computed of it."""

    content: bytes
    filename: str
    purpose: Purpose
    kind: Kind
    perceived: Seen | HeardText
    seconds: float | None = None
    """That it shall be kept, if that is less than the store keeps any."""


class FileStore:
    """The files of all owners. Every method reads or writes the disk, so call them in a thread."""

    def __init__(self, config: FilesConfig):
        self._config = config
        self._folder = config.folder

    def of(self, owner: str) -> "OwnedFiles":
        """One owner's files; the empty string is who asks without a key."""
        return OwnedFiles(self, self._folder / hashlib.sha256(owner.encode()).hexdigest()[:32])

    def make_room(self, n_bytes: int) -> None:
        """Remove what is over, and refuse a file for which there is no room before anything is computed of it.

        Raises:
            StorageFull: it would be one too many, or they would be too large together.
        """
        if self._folder.is_dir():
            with FileLock(self._folder / ".lock"):
                self.sweep()
        self._require_room(n_bytes)

    def _require_room(self, n_bytes: int) -> None:
        files = [_size(folder) for folder in self._files()]
        most = self._config
        if len(files) + 1 > most.max_files:
            raise StorageFull(
                f"there are {len(files)} files and at most {most.max_files} are kept: delete some", "file"
            )
        if (held := sum(files)) + n_bytes > most.max_bytes:
            raise StorageFull(
                f"the files that are kept take {held} bytes of {most.max_bytes}, and this one {n_bytes}: delete some",
                "file",
            )

    def add(self, owned: Path, new: NewFile) -> StoredFile:
        """Write a file into an owner's folder; it is there whole or not at all.

        Raises:
            StorageFull: there is no room for it by the config.
            EnvironmentLack: the folder cannot be written, or its disk is full.
        """
        now = time.time()
        lives = [s for s in (new.seconds, self._config.time_to_live_s) if s is not None]
        record = FileRecord(
            id=f"file-{secrets.token_hex(16)}",
            filename=new.filename,
            purpose=new.purpose,
            kind=new.kind,
            bytes=len(new.content),
            created_at=now,
            expires_at=now + min(lives) if lives else None,
        )
        making = self._folder / f"{_MAKING}{record.id}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            making.mkdir()
            write_whole(making / CONTENT, new.content)
            write_perceived(making, new.perceived)
            write_whole(making / RECORD, record.model_dump_json().encode())
            owned.mkdir(exist_ok=True)
            with FileLock(self._folder / ".lock"):
                self.sweep()
                self._require_room(_size(making))
                making.rename(owned / record.id)
        except (OSError, EnvironmentLack) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise EnvironmentLack(f"{self._folder}: the file cannot be kept there: {reason}") from error
        finally:
            shutil.rmtree(making, ignore_errors=True)
        _sync(owned)
        return StoredFile(owned / record.id, record)

    def remove(self, folder: Path) -> bool:
        """Remove a file; whether it was there. It is gone for everybody at once, and then from the disk."""
        gone = self._folder / f"{_GONE}{secrets.token_hex(16)}"
        try:
            folder.rename(gone)
        except FileNotFoundError:
            return False
        shutil.rmtree(gone, ignore_errors=True)
        return True

    def sweep(self) -> None:
        """Remove what has expired, and what a process left half made or half removed."""
        now = time.time()
        for folder in self._files():
            record = read_record(folder)
            if (record is None and _is_left_over(folder, now)) or (record and _is_over(record, now)):
                self.remove(folder)
        for folder in _folders(self._folder):
            if folder.name.startswith((_MAKING, _GONE)) and _is_left_over(folder, now):
                shutil.rmtree(folder, ignore_errors=True)

    def _files(self) -> Iterator[Path]:
        for owned in _folders(self._folder):
            if not owned.name.startswith("."):
                yield from _folders(owned)


@dataclass(frozen=True)
class OwnedFiles:
    """One owner's files: others' are as good as missing."""

    store: FileStore
    folder: Path

    def add(self, new: NewFile) -> StoredFile:
        """As `FileStore.add`."""
        return self.store.add(self.folder, new)

    def get(self, id: str, param: str | None = None) -> StoredFile:
        """A file by its id, which may be anything that a caller sends.

        Raises:
            FileMissing: there is none, it has expired, or it is another's.
        """
        if not is_file_id(id):  # before the disk is touched
            raise file_missing(id, param)
        record = read_record(self.folder / id)
        if record is not None and _is_over(record, time.time()):
            self.store.remove(self.folder / id)
            record = None
        if record is None:
            raise file_missing(id, param)
        return StoredFile(self.folder / id, record)

    def list(self) -> list[FileRecord]:
        """Records of all files, the oldest first."""
        now = time.time()
        found = [record for folder in _folders(self.folder) if (record := read_record(folder)) is not None]
        return sorted((r for r in found if not _is_over(r, now)), key=lambda record: (record.created_at, record.id))

    def delete(self, id: str) -> None:
        """Remove a file with all that was computed of it.

        Raises:
            FileMissing: as `get`.
        """
        if not self.store.remove(self.get(id).folder):
            raise file_missing(id)


def _is_over(record: FileRecord, now: float) -> bool:
    return record.expires_at is not None and record.expires_at <= now


def _is_left_over(folder: Path, now: float) -> bool:
    with suppress(FileNotFoundError):
        return now - folder.stat().st_mtime > _LEFT_OVER_S
    return False


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _size(folder: Path) -> int:
    """Bytes of all that lies in a file's folder."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:  # it may be removed while we look
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += _size(Path(entry.path))
            else:
                total += entry.stat(follow_symlinks=False).st_size
    return total


def _sync(folder: Path) -> None:
    """Let a rename into a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
