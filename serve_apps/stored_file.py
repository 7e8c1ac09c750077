"""One uploaded file, as it lies on disk: a folder of its own, which appears whole and disappears at once.

    content           the bytes as they were uploaded
    file.json         what is said of it (`FileRecord`)
    features/         an image's CLIP features, in the feature store's format and under its keys
    transcript.json   what was heard in a sound, and by what

What is computed of a file names what computed it, and is not used when that has changed. Does not know owners, limits
or HTTP.
"""

import json
import logging
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mmllm_core.config import StrictModel
from mmllm_core.data.feature_shards import Features, encoder_of
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.errors import BadInput, EnvironmentLack, FeatureStoreError

ID_PATTERN = r"^file-[0-9a-f]{32}$"
RECORD, CONTENT, FEATURES, TRANSCRIPT = "file.json", "content", "features", "transcript.json"
Kind = Literal["image", "sound"]
Purpose = Literal["vision", "user_data", "assistants"]
_log = logging.getLogger(__name__)


class FileMissing(BadInput):
    """A file that its caller does not have: never uploaded, deleted, expired, or another's."""

    code = "file_not_found"
    status = 404


class FileRecord(StrictModel):
    """What is said of a file."""

    id: Annotated[str, Field(pattern=ID_PATTERN)]
    filename: str
    """As its owner called it; never a path."""
    purpose: Purpose
    kind: Kind
    bytes: int
    created_at: float
    """Seconds since the epoch, as `expires_at`."""
    expires_at: float | None


@dataclass(frozen=True)
class Seen:
    """An image's features, float16 (n_patches, d_vision), and the key that they are stored under."""

    key: str
    features: Features
    tier: str = "computed"
    """Where they were found: `memory`, `store`, `shared` (computed at that time for another request), or `computed`."""


class HeardText(StrictModel):
    """What was said in a sound, and the fingerprint of what heard it: `transcript.json`."""

    fingerprint: str
    text: str


@dataclass(frozen=True)
class StoredFile:
    """A file in its folder. Every method reads or writes the disk, so call them in a thread."""

    folder: Path
    record: FileRecord

    def content(self) -> bytes:
        """The bytes as they were uploaded.

        Raises:
            FileMissing: the file was deleted.
        """
        try:
            return (self.folder / CONTENT).read_bytes()
        except FileNotFoundError:
            raise file_missing(self.record.id) from None

    def features(self, fingerprint: str) -> Features | None:
        """Features (n_patches, d_vision) that the encoder of this fingerprint made, or None if none are whole."""
        try:
            store = FeatureStore(self.folder / FEATURES, fingerprint)
            keys = store.keys()
            return store.get(keys[0]) if keys else None
        except FeatureStoreError as error:
            _log.warning("features of %s are computed anew: %s", self.record.id, error)
            return None

    def transcript(self, fingerprint: str) -> str | None:
        """What the model of this fingerprint heard, or None if it has not listened."""
        try:
            heard = HeardText.model_validate_json((self.folder / TRANSCRIPT).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return heard.text if heard.fingerprint == fingerprint else None

    def keep(self, perceived: Seen | HeardText) -> None:
        """Keep what was computed of a file that is there already; a disk that is full costs only that."""
        if not (self.folder / RECORD).is_file():  # deleted meanwhile
            return
        try:
            write_perceived(self.folder, perceived)
        except (OSError, EnvironmentLack) as error:
            _log.warning("what was computed of %s is not kept: %s", self.record.id, error)


def is_file_id(text: str) -> bool:
    """Whether a text has the shape of a file's id."""
    return re.fullmatch(ID_PATTERN, text) is not None


def file_missing(id: str, param: str | None = None) -> FileMissing:
    """The error for an id, which is repeated only if it looks like one."""
    named = f" '{id}'" if len(id) <= 64 and id.isprintable() else ""
    return FileMissing(f"there is no file{named}: upload it, and give the id that came back", param)


def write_perceived(folder: Path, perceived: Seen | HeardText) -> None:
    """Write what was computed of a file into its folder, in place of what another encoder or model made.

    Raises:
        OSError, EnvironmentLack: it cannot be written.
    """
    if isinstance(perceived, Seen):
        store = FeatureStore(folder / FEATURES, encoder_of(perceived.key))
        if perceived.key not in store:
            shutil.rmtree(folder / FEATURES, ignore_errors=True)
            store.write([perceived.key], perceived.features[None])
    else:
        write_whole(folder / TRANSCRIPT, perceived.model_dump_json().encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is seen whole or not at all, whatever happens to this machine.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_record(folder: Path) -> FileRecord | None:
    """The record in a file's folder, or None if there is no file or its record is damaged."""
    try:
        return FileRecord.model_validate(json.loads((folder / RECORD).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        _log.warning("%s: is damaged and not used", folder / RECORD)
        return None
