"""CLIP features that were computed ahead: written once, found by content, read without loading what is not asked for.

In: features by key (`ClipEncoder.key`: the pixels and what encodes them). Out: features by key, float16
(n_patches, d_vision), or None. A store is a local folder or a URL (`feature_location`) that holds shards
(`feature_shards`).

Any number of processes may write at once: each adds shards of its own, and a reader sees a shard whole or not at all.
Where a key was written twice either copy may be returned. Nothing damaged is ever returned: every row is checked
whenever it is read; a damaged one is reported once, and then counts as missing unless another copy is whole.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from mmllm_core.data.feature_location import FeatureLocation, open_location
from mmllm_core.data.feature_shards import (
    ARRAY,
    INDEX,
    DamagedIndex,
    Features,
    ShardIndex,
    fingerprint_of,
    read_index,
    write_shard,
)
from mmllm_core.data.shard_rows import RowReader, ShardCache
from mmllm_core.models.home import features_cache

_log = logging.getLogger(__name__)
_REQUESTS = 16
"""Requests to an object store at a time."""

_LISTINGS = 10
"""Listings that a refresh makes at most, while shards go on being moved beneath it."""

_SPAN = 4
"""Rows read for each row that is wanted, at most, where that saves requests."""

_Place = tuple[ShardIndex, int]
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class FeatureStore:
    """Features by key.

    Args:
        location: a folder or a URL; it need not exist before something is written.
        fingerprint: look at this encoder's features alone, which opens faster; None looks at all.
        cache_bytes: how much of an object store may be copied to this machine and memory-mapped there; what does
            not fit is read over the network, row by row. Worth it for readers that come back, such as training.

    Raises:
        FeatureStoreError: the location cannot be reached. Every method may raise it.
    """

    def __init__(self, location: str | Path, fingerprint: str | None = None, *, cache_bytes: int = 0):
        self._location = open_location(location)
        self._fingerprint = fingerprint
        remote = not self._location.local
        self._cache = ShardCache(features_cache(str(location)), cache_bytes) if remote and cache_bytes else None
        self._reader = RowReader(self._location, self._cache)
        self._shards: dict[str, ShardIndex] = {}
        self._places: dict[str, _Place] = {}
        self._other_copies: dict[str, list[_Place]] = {}
        self._unusable: set[str] = set()
        self._lock = threading.RLock()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def keys(self) -> list[str]:
        """All that is stored, the oldest known first."""
        return list(self._places)

    def refresh(self) -> None:
        """Take in shards that other writers have added, and let go of those that were removed."""
        for _ in range(_LISTINGS):
            with self._lock:
                known = set(self._shards)
            listed = {file.name.removesuffix(INDEX) for file in self._location.list() if file.name.endswith(INDEX)}
            names = {name for name in listed if self._fingerprint in (None, fingerprint_of(name))}
            opened = each(self._location, self._open, sorted(names - known - self._unusable))
            if None not in opened:
                break
            # A shard was removed since it was listed: where its rows went, only a new listing tells.
        with self._lock:
            for shard in opened:  # before what is gone goes: a key that moved is never without a place
                if isinstance(shard, ShardIndex):
                    self._add(shard)
            for name in known - names:
                self._drop(name)
        if self._cache:
            self._cache.keep_only(listed)

    def get(self, key: str) -> Features | None:
        """The stored features, float16 (n_patches, d_vision), read-only, or None if there are none that are whole."""
        while (place := self._places.get(key)) is not None:
            shard, row = place
            try:
                found = shard.decode(row, self._reader.read(shard, row))
            except FileNotFoundError:  # garbage collection moves rows to other shards
                self.refresh()
                if shard.name in self._shards:
                    self._give_up(shard.name, "its array is missing")
                continue
            if found is not None:
                return found
            _log.warning("feature store %s: row %d of %s is damaged and not used", self._location, row, shard.name)
            with self._lock:
                self._remove(key, place)
        return None

    def missing(self, keys: Iterable[str], *, read: bool = False) -> list[str]:
        """Keys that are not stored, each once, in the order given.

        Args:
            read: also read and check what is stored, and count what is damaged as missing.
        """
        wanted = list(dict.fromkeys(keys))
        if read:
            stored: dict[ShardIndex, list[int]] = {}
            for key in wanted:
                if (place := self._places.get(key)) is not None:
                    stored.setdefault(place[0], []).append(place[1])
            each(self._location, self._check_rows, list(stored.items()))
        return [key for key in wanted if key not in self._places]

    def write(self, keys: Sequence[str], features: Features) -> None:
        """Append one shard.

        Args:
            keys: of one encoder, each once.
            features: float16 (len(keys), n_patches, d_vision).

        Raises:
            ValueError: keys and features do not fit each other.
            EnvironmentLack: the disk is full or the place cannot be written; nothing became visible.
        """
        shard = write_shard(self._location, keys, features)
        with self._lock:
            self._add(shard)

    def _check_rows(self, wanted: tuple[ShardIndex, list[int]]) -> None:
        """Drop rows that are damaged. Rows that lie near each other in an object store take one request."""
        shard, rows = wanted
        first, span = min(rows), max(rows) - min(rows) + 1
        data = b""
        if not self._location.local and span <= _SPAN * len(rows):
            with suppress(FileNotFoundError):
                data = self._location.read(shard.name + ARRAY, shard.row_start(first), span * shard.row_bytes)
        for row in rows:
            start = (row - first) * shard.row_bytes
            if shard.decode(row, memoryview(data)[start : start + shard.row_bytes]) is None:
                self.get(shard.keys[row])  # which has the last word, and reports

    def _open(self, name: str) -> ShardIndex | DamagedIndex | None:
        """A shard's index; None if it is not there any more."""
        try:
            return read_index(self._location, name)
        except FileNotFoundError:
            return None
        except DamagedIndex as error:
            self._give_up(name, str(error))
            return error

    def _add(self, shard: ShardIndex) -> None:
        if shard.name in self._shards:  # another thread was faster
            return
        self._shards[shard.name] = shard
        for row, key in enumerate(shard.keys):
            if key in self._places:
                self._other_copies.setdefault(key, []).append((shard, row))
            else:
                self._places[key] = (shard, row)

    def _give_up(self, name: str, reason: str) -> None:
        _log.warning("feature store %s: %s is damaged and not used: %s", self._location, name, reason)
        with self._lock:
            self._unusable.add(name)
            self._drop(name)

    def _drop(self, name: str) -> None:
        shard = self._shards.pop(name, None)
        if shard is None:
            return
        for row, key in enumerate(shard.keys):
            self._remove(key, (shard, row))
        self._reader.forget(name)

    def _remove(self, key: str, place: _Place) -> None:
        others = self._other_copies.pop(key, [])
        if place in others:
            others.remove(place)
        elif self._places.get(key) == place:
            if others:
                self._places[key] = others.pop(0)
            else:
                del self._places[key]
        if others:
            self._other_copies[key] = others


def each(location: FeatureLocation, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> list[ResultT]:
    """Call `function` on every item, several at a time where each waits for an object store."""
    if location.local or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(max_workers=_REQUESTS) as pool:
        return list(pool.map(function, items))
