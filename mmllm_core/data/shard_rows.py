"""Reading one row of a shard: through a memory map where the shard is on this machine, else by a range of bytes.

In: a shard's index and a row's number. Out: the row's bytes as they lie there, not yet checked. Shards of an object
store may be copied to a folder of this machine, up to a bound; the rows of shards beyond it are read by range, so
that a store larger than the bound is never copied over and over. Does not know keys.
"""

import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path

from mmllm_core.data.feature_location import FeatureLocation, LocalFolder
from mmllm_core.data.feature_shards import ARRAY, ShardIndex
from mmllm_core.errors import EnvironmentLack, FeatureStoreError

_MAX_MAPS = 256
"""Shards mapped at a time: each holds one of the process's file descriptors, of which 1,024 are usual."""


class RowReader:
    """Reads rows of the shards at a location.

    Args:
        cache: where shards of an object store are copied to; None copies none.
    """

    def __init__(self, location: FeatureLocation, cache: "ShardCache | None" = None):
        self._location = location
        self._cache = None if location.local else cache
        self._maps = _MappedFiles()

    def read(self, shard: ShardIndex, row: int) -> bytes:
        """A row's bytes; fewer than a row has where the file was truncated.

        Raises:
            FileNotFoundError: the shard's array is not there (any more).
            FeatureStoreError: it is there and cannot be read.
        """
        if self._location.local:
            return self._maps.read(self._location.path(shard.name + ARRAY), shard.row_start(row), shard.row_bytes)
        copy = self._cache.copy_of(shard, self._location) if self._cache else None
        if copy is not None:
            try:
                data = self._maps.read(copy, shard.row_start(row), shard.row_bytes)
            except FileNotFoundError:  # another process made room
                data = b""
            if shard.decode(row, data) is not None:
                return data
            self.forget(shard.name)  # the copy is damaged, which says nothing about the original
        return self._location.read(shard.name + ARRAY, shard.row_start(row), shard.row_bytes)

    def forget(self, name: str) -> None:
        """Let go of a shard that is gone; what was read of it stays valid."""
        if self._location.local:
            self._maps.close(self._location.path(name + ARRAY))
        elif self._cache:
            self._maps.close(self._cache.discard(name))


class ShardCache:
    """Copies of an object store's shards in a folder of this machine.

    Args:
        folder: of this store alone; processes may share it.
        max_bytes: that the folder may hold.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._files = LocalFolder(folder)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._refused: set[str] = set()

    def copy_of(self, shard: ShardIndex, location: FeatureLocation) -> Path | None:
        """The copy of a shard's array, made now if there is room for it; None if there is none."""
        name = shard.name + ARRAY
        path = self._files.path(name)
        if path.exists():
            return path
        if shard.name in self._refused:
            return None
        with self._lock:
            if path.exists():
                return path
            held = sum(file.n_bytes for file in self._files.list())
            if held + shard.n_bytes > self._max_bytes:
                self._refused.add(shard.name)
                return None
            try:
                self._files.put(name, [location.read(name)])
            except EnvironmentLack:  # the disk is full: read by range instead
                self._refused.add(shard.name)
                return None
        return path

    def discard(self, name: str) -> Path:
        """Remove a copy; returns where it lay."""
        self._files.delete(name + ARRAY)
        return self._files.path(name + ARRAY)

    def keep_only(self, names: set[str]) -> None:
        """Remove copies of shards that the store no longer has."""
        for file in self._files.list():
            if file.name.endswith(ARRAY) and file.name.removesuffix(ARRAY) not in names:
                self._files.delete(file.name)
                self._refused.clear()


class _MappedFiles:
    """Memory maps of the files that were read last."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, start: int, length: int) -> bytes:
        with self._lock:
            mapped = self._maps.get(path) or self._map(path)
            if mapped is None:
                return b""
            self._maps.move_to_end(path)
            if len(self._maps) > _MAX_MAPS:
                self._maps.popitem(last=False)
        # Touching a page beyond the end of a file that shrank since it was mapped would kill the process.
        end = min(start + length, len(mapped), mapped.size())
        return mapped[start:end]

    def close(self, path: Path) -> None:
        """Let go of a map; it closes when the last thread that reads it is done."""
        with self._lock:
            self._maps.pop(path, None)

    def _map(self, path: Path) -> mmap.mmap | None:
        """Map a file; None if it is empty, which cannot be mapped."""
        try:
            with path.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size == 0:
                    return None
                self._maps[path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FeatureStoreError(f"{path}: cannot be read: {error.strerror or error}") from error
        return self._maps[path]
