"""Shards: how features lie in files, and how damage to them is seen.

In: float16 features (n, n_patches, d_vision) of one encoder and their keys. Out: two files, and rows of them that
were checked when they were read.

    NAME.npy     the features as NumPy writes them, so that any tool can read and memory-map them
    NAME.index   line 1: sha256 of line 2. Line 2, JSON: keys, shape, where the rows begin, and xxh3 of every row

NAME is the encoder's fingerprint and a random number. The index is written last: a shard without one does not exist.
The index vouches for itself and for each row alone, so that opening a shard reads its index, and reading a row reads
and checks this row and no other. Does not know how keys are found again.
"""

import hashlib
import io
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from mmllm_core.data.feature_location import FeatureLocation

NAME = re.compile(r"(?:[^-]+-)?[0-9a-f]{32}\.")
"""How names of a store's files begin; those of the first format had no fingerprint."""
INDEX = ".index"
ARRAY = ".npy"

Features = NDArray[np.float16]


class DamagedIndex(ValueError):
    """An index that does not hold what was written."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What a shard holds."""

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, int]
    """(n_patches, d_vision) of a row."""
    offset: int
    """Byte of the array file at which the rows begin."""
    checksums: tuple[int, ...]
    """xxh3-64 of each row's bytes."""

    @property
    def fingerprint(self) -> str:
        """The encoder whose features these are."""
        return fingerprint_of(self.name)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return prod(self.shape) * np.dtype(np.float16).itemsize

    @property
    def n_bytes(self) -> int:
        """Bytes of the array file."""
        return self.offset + len(self.keys) * self.row_bytes

    def row_start(self, row: int) -> int:
        """Byte of the array file at which a row begins."""
        return self.offset + row * self.row_bytes

    def decode(self, row: int, data: bytes | memoryview) -> Features | None:
        """A row's features (n_patches, d_vision), read-only, or None if the bytes are not those that were written."""
        if len(data) != self.row_bytes or row_checksum(data) != self.checksums[row]:
            return None
        return np.frombuffer(data, dtype="<f2").reshape(self.shape)


def fingerprint_of(name: str) -> str:
    """The encoder that a shard's or file's name begins with."""
    return name.partition("-")[0]


def encoder_of(key: str) -> str:
    """The encoder that a feature key ends with (`mmllm_core.vision.feature_key`)."""
    return key.rpartition("-")[2]


def row_checksum(data: bytes | memoryview) -> int:
    """xxh3-64: at memory speed, and it misses damage once in 2^64 times."""
    import xxhash

    return xxhash.xxh3_64_intdigest(data)


def write_shard(location: FeatureLocation, keys: Sequence[str], features: Features) -> ShardIndex:
    """Write one shard.

    Args:
        keys: of one encoder, each once.
        features: float16 (len(keys), n_patches, d_vision).

    Raises:
        ValueError: keys and features do not fit each other.
        EnvironmentLack: the location cannot be written; nothing became visible.
    """
    if len(keys) != len(features) or features.dtype != np.float16 or features.ndim != 3 or not keys:
        raise ValueError(
            f"{len(keys)} keys for features of shape {features.shape} and dtype {features.dtype}: "
            "want one key a row of float16 (n, n_patches, d_vision)"
        )
    encoders = {encoder_of(key) for key in keys}
    if len(encoders) != 1 or len(set(keys)) != len(keys):
        raise ValueError(f"a shard holds each key once and features of one encoder, not of {sorted(encoders)}")
    features = np.ascontiguousarray(features, dtype="<f2")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(features))
    index = ShardIndex(
        name=f"{encoders.pop()}-{uuid.uuid4().hex}",
        keys=tuple(keys),
        shape=(features.shape[1], features.shape[2]),
        offset=header.tell(),
        checksums=tuple(row_checksum(row.data) for row in features),
    )
    location.put(index.name + ARRAY, [header.getvalue(), features.data.cast("B")])
    location.put(index.name + INDEX, [_encode_index(index)])
    return index


def read_index(location: FeatureLocation, name: str) -> ShardIndex:
    """Read a shard's index.

    Raises:
        FileNotFoundError: there is none (any more).
        DamagedIndex: it does not hold what was written.
    """
    digest, _, body = location.read(name + INDEX).partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedIndex("the index's checksum differs")
    values = json.loads(body)
    rows, columns = values["shape"]
    return ShardIndex(name, tuple(values["keys"]), (rows, columns), values["offset"], tuple(values["xxh3"]))


def _encode_index(index: ShardIndex) -> bytes:
    values = {"shape": index.shape, "offset": index.offset, "keys": index.keys, "xxh3": index.checksums}
    body = json.dumps(values, separators=(",", ":")).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body
