"""CLIP features on disk: written once, found by content, read without loading what is not asked for.

A store is a folder of shards. A shard is a float16 array (n, n_patches, d_vision) in `NAME.npy` beside
`NAME.json`, which lists its keys and the sha256 of the array file. Shards are written aside and renamed,
index last, so any number of writers may append and a reader never meets half a shard. A shard whose
checksum fails is reported and treated as absent: its features are computed again, never used.
"""

import json
import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmllm_core.vision import file_sha256

_log = logging.getLogger(__name__)


class FeatureStore:
    """Features by key (`ClipEncoder.key`).

    Args:
        folder: made when it does not exist.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._shards: dict[str, NDArray[np.float16]] = {}
        self._rows: dict[str, tuple[str, int]] = {}
        self._seen: set[str] = set()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def refresh(self) -> None:
        """Take in shards that other writers have added."""
        for index in sorted(self._folder.glob("*.json")):
            if index.stem not in self._seen:
                self._seen.add(index.stem)
                self._open(index)

    def get(self, key: str) -> NDArray[np.float16] | None:
        """The stored features, float16 (n_patches, d_vision) as a read-only view, or None."""
        place = self._rows.get(key)
        return None if place is None else self._shards[place[0]][place[1]]

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Keys that are not stored, each once, in the order given."""
        return [key for key in dict.fromkeys(keys) if key not in self._rows]

    def write(self, keys: Sequence[str], features: NDArray[np.float16]) -> None:
        """Append one shard.

        Args:
            features: float16 (len(keys), n_patches, d_vision).

        Raises:
            ValueError: keys and features differ in number, or features are not float16.
        """
        if len(keys) != len(features) or features.dtype != np.float16:
            raise ValueError(f"{len(keys)} keys for {len(features)} features of dtype {features.dtype}; want float16")
        name = uuid.uuid4().hex
        array = self._folder / f"{name}.npy"
        partial = array.with_suffix(".partial")
        with partial.open("wb") as stream:
            np.save(stream, features)
            stream.flush()
            os.fsync(stream.fileno())
        index = {"keys": list(keys), "sha256": file_sha256(partial)}
        partial.rename(array)
        partial_index = self._folder / f"{name}.json.partial"
        partial_index.write_text(json.dumps(index), encoding="utf-8")
        partial_index.rename(self._folder / f"{name}.json")
        self.refresh()

    def _open(self, index: Path) -> None:
        array = index.with_suffix(".npy")
        try:
            entry = json.loads(index.read_text(encoding="utf-8"))
            if file_sha256(array) != entry["sha256"]:
                raise ValueError("checksum differs")
            keys, shard = entry["keys"], np.load(array, mmap_mode="r", allow_pickle=False)
            if len(keys) != len(shard):
                raise ValueError(f"{len(keys)} keys for {len(shard)} rows")
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("feature shard %s is damaged and will be computed again: %s", array, error)
            return
        self._shards[index.stem] = shard
        for row, key in enumerate(keys):
            self._rows.setdefault(key, (index.stem, row))
