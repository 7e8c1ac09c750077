"""Looking after a feature store: what it holds, whether it is whole, and what can go.

In: a location. Out: figures by encoder, damage by shard, and fewer, larger shards. All of it may run beside writers
and readers: a copy is whole before its original goes, an index goes before its array, and garbage collection leaves
alone what is younger than an age. Does not know bundles; the caller says which encoders are wanted.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmllm_core.data.feature_location import FeatureLocation, ListedFile, open_location
from mmllm_core.data.feature_shards import (
    ARRAY,
    INDEX,
    NAME,
    DamagedIndex,
    Features,
    ShardIndex,
    read_index,
    write_shard,
)
from mmllm_core.data.feature_store import each

SHARD_BYTES = 256_000_000
"""Small shards are put together up to this size; one of half of it or more is left as it is."""


@dataclass
class EncoderSummary:
    """What a store holds of one encoder."""

    fingerprint: str
    keys: set[str] = field(default_factory=set, repr=False)
    shapes: set[tuple[int, int]] = field(default_factory=set)
    """(n_patches, d_vision); one, unless something is wrong."""
    n_shards: int = 0
    n_bytes: int = 0


@dataclass(frozen=True)
class Damage:
    """A shard that does not hold what was written."""

    name: str
    reason: str
    rows: tuple[int, ...] | None
    """Rows that are damaged; None where the shard as a whole cannot be read."""


@dataclass(frozen=True)
class Verification:
    """What a full pass found."""

    n_shards: int
    n_rows: int
    n_bytes: int
    damage: tuple[Damage, ...]


@dataclass(frozen=True)
class GarbagePlan:
    """What garbage collection looks for.

    An encoder goes when `unwanted` says so of its fingerprint.
    """

    min_age_s: float = 86_400.0
    """Nothing younger is touched: a writer may be at it."""
    unwanted: Callable[[str], bool] = lambda fingerprint: False
    dry_run: bool = False


@dataclass
class Collected:
    """What garbage collection removed, or would remove."""

    leftovers: int = 0
    """Files of writers that never finished."""
    unwanted_shards: int = 0
    duplicate_rows: int = 0
    damaged_rows: int = 0
    compacted: int = 0
    """Shards that were put together into `made`."""
    made: int = 0
    n_bytes: int = 0
    """Bytes freed, less those that were written."""


def summarise(location: str | Path) -> list[EncoderSummary]:
    """Figures of every encoder in a store, in order of fingerprint; shards that cannot be read are left out."""
    place = open_location(location)
    listing = {file.name: file for file in place.list()}
    found: dict[str, EncoderSummary] = {}
    for shard in _read_all(place, listing):
        if isinstance(shard, Damage):
            continue
        summary = found.setdefault(shard.fingerprint, EncoderSummary(shard.fingerprint))
        summary.keys.update(shard.keys)
        summary.shapes.add(shard.shape)
        summary.n_shards += 1
        summary.n_bytes += sum(_size(listing, shard.name + suffix) for suffix in (ARRAY, INDEX))
    return [found[fingerprint] for fingerprint in sorted(found)]


def verify(
    location: str | Path, *, remove: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> Verification:
    """Read and check everything.

    Args:
        remove: drop what is damaged, so that it is computed again; whole rows of damaged shards are kept.
        progress: called with the shards done and all shards.
    """
    place = open_location(location)
    listing = {file.name: file for file in place.list()}
    shards = list(_read_all(place, listing))
    damage: list[Damage] = []
    n_rows = n_bytes = 0
    for done, shard in enumerate(shards):
        progress(done, len(shards))
        if isinstance(shard, ShardIndex):
            n_rows += len(shard.keys)
            n_bytes += shard.n_bytes
            problem = _check(place, shard)
            if remove and problem and problem.rows is not None:
                whole = sorted(set(range(len(shard.keys))) - set(problem.rows))
                with suppress(FileNotFoundError):  # somebody collected it meanwhile
                    _rewrite(place, [(shard, whole)])
        else:
            problem = shard
        if problem:
            damage.append(problem)
            if remove:
                _delete(place, problem.name)
    progress(len(shards), len(shards))
    return Verification(len(shards), n_rows, n_bytes, tuple(damage))


def collect_garbage(location: str | Path, plan: GarbagePlan = GarbagePlan()) -> Collected:
    """Remove leftovers, unwanted encoders, duplicates and damage, and put small shards together."""
    place = open_location(location)
    listing = {file.name: file for file in place.list()}
    before = time.time() - plan.min_age_s
    done = Collected()
    for file in listing.values():
        if NAME.match(file.name) and file.modified <= before and _is_leftover(file.name, listing):
            done.leftovers += 1
            done.n_bytes += file.n_bytes
            if not plan.dry_run:
                place.delete(file.name)
    old: dict[str, list[ShardIndex]] = {}
    for shard in _read_all(place, listing):
        if isinstance(shard, Damage) or listing[shard.name + INDEX].modified > before:
            continue  # damage is for `verify` to report and remove
        if plan.unwanted(shard.fingerprint):
            done.unwanted_shards += 1
            done.n_bytes += sum(_size(listing, shard.name + suffix) for suffix in (ARRAY, INDEX))
            if not plan.dry_run:
                _delete(place, shard.name)
        else:
            old.setdefault(shard.fingerprint, []).append(shard)
    for shards in old.values():
        for group in _groups(_worth_rewriting(place, shards)):
            _replace(place, group, plan.dry_run, done)
    return done


_Part = tuple[ShardIndex, list[int]]
"""A shard and those of its rows that stay."""


def _worth_rewriting(place: FeatureLocation, shards: list[ShardIndex]) -> Iterator[_Part]:
    """Shards that are small or hold rows that an earlier one holds whole."""
    first: dict[str, tuple[ShardIndex, int]] = {}
    for shard in shards:
        rows = []
        for row, key in enumerate(shard.keys):
            if key not in first or not _is_whole(place, *first[key]):
                first[key] = (shard, row)
                rows.append(row)
        if len(rows) < len(shard.keys) or shard.n_bytes < SHARD_BYTES // 2:
            yield shard, rows


def _groups(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Parts of one shape, up to `SHARD_BYTES` together."""
    group: list[_Part] = []
    size = 0
    for shard, rows in parts:
        n_bytes = len(rows) * shard.row_bytes
        if group and (size + n_bytes > SHARD_BYTES or shard.shape != group[0][0].shape):
            yield group
            group, size = [], 0
        group.append((shard, rows))
        size += n_bytes
    if group:
        yield group


def _replace(place: FeatureLocation, group: list[_Part], dry_run: bool, done: Collected) -> None:
    duplicates = sum(len(shard.keys) - len(rows) for shard, rows in group)
    if len(group) == 1 and not duplicates:
        return
    written = sum(len(rows) * shard.row_bytes for shard, rows in group)
    made = written > 0
    if not dry_run:
        try:
            new, damaged = _rewrite(place, group)
        except FileNotFoundError:  # somebody else collects garbage too
            return
        for shard, _ in group:
            _delete(place, shard.name)
        done.damaged_rows += damaged
        made, written = new is not None, new.n_bytes if new else 0
    done.duplicate_rows += duplicates
    done.compacted += len(group)
    done.made += made
    done.n_bytes += sum(shard.n_bytes for shard, _ in group) - written


def _rewrite(place: FeatureLocation, parts: list[_Part]) -> tuple[ShardIndex | None, int]:
    """Write the rows given, of one or several shards of one encoder, as one new shard.

    Returns:
        The new shard, or None if no row was whole, and how many rows were damaged.
    """
    keys: list[str] = []
    features: list[Features] = []
    damaged = 0
    for shard, rows in parts:
        data = memoryview(place.read(shard.name + ARRAY))
        for row in rows:
            found = shard.decode(row, data[shard.row_start(row) :][: shard.row_bytes])
            if found is None:
                damaged += 1
            else:
                keys.append(shard.keys[row])
                features.append(found)
    return (write_shard(place, keys, np.stack(features)) if keys else None), damaged


def _check(place: FeatureLocation, shard: ShardIndex) -> Damage | None:
    try:
        data = memoryview(place.read(shard.name + ARRAY))
    except FileNotFoundError:
        try:
            read_index(place, shard.name)
        except FileNotFoundError:  # somebody collected the whole shard since it was listed
            return None
        return Damage(shard.name, "its array is missing", None)
    n_rows = len(shard.keys)
    bad = tuple(r for r in range(n_rows) if shard.decode(r, data[shard.row_start(r) :][: shard.row_bytes]) is None)
    return Damage(shard.name, f"{len(bad)} of {n_rows} rows differ from what was written", bad) if bad else None


def _is_whole(place: FeatureLocation, shard: ShardIndex, row: int) -> bool:
    try:
        data = place.read(shard.name + ARRAY, shard.row_start(row), shard.row_bytes)
    except FileNotFoundError:
        return False
    return shard.decode(row, data) is not None


def _read_all(place: FeatureLocation, listing: Iterable[str]) -> Iterator[ShardIndex | Damage]:
    def read(name: str) -> ShardIndex | Damage | None:
        try:
            return read_index(place, name)
        except DamagedIndex as error:
            return Damage(name, str(error), None)
        except FileNotFoundError:  # removed since it was listed
            return None

    names = sorted(name.removesuffix(INDEX) for name in listing if name.endswith(INDEX))
    yield from (found for found in each(place, read, names) if found is not None)


def _delete(place: FeatureLocation, name: str) -> None:
    place.delete(name + INDEX)
    place.delete(name + ARRAY)


def _size(listing: dict[str, ListedFile], name: str) -> int:
    return listing[name].n_bytes if name in listing else 0


def _is_leftover(name: str, listing: Iterable[str]) -> bool:
    """Whether a file belongs to no shard: an array without an index, or neither."""
    return not name.endswith(INDEX) and (not name.endswith(ARRAY) or name.removesuffix(ARRAY) + INDEX not in listing)
