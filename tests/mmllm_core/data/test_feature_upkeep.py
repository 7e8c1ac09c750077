"""Upkeep finds what is wrong, removes what can go and nothing else, and disturbs nobody."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mmllm_core.data.feature_location import open_location
from mmllm_core.data.feature_shards import ARRAY, INDEX
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.data.feature_upkeep import GarbagePlan, collect_garbage, summarise, verify
from tests.mmllm_core.data.stored import ENCODER, features, key

A, B, C, D = map(key, "abcd")
OTHER = "fedcba9876543210"
NOW = GarbagePlan(min_age_s=0)


def flip_last_row(location: str, shard: int = 0) -> None:
    """Flip a bit of the last row of a shard, counted in order of name."""
    place = open_location(location)
    name = [file.name for file in place.list() if file.name.endswith(ARRAY)][shard]
    data = place.read(name)
    place.put(name, [data[:-1] + bytes([data[-1] ^ 1])])


def names(location: str) -> list[str]:
    return [file.name for file in open_location(location).list()]


def test_a_summary_counts_each_encoder(location: str) -> None:
    store = FeatureStore(location)
    store.write([A, B], features(2))
    store.write([B], features(1))
    store.write([key("a", OTHER)], np.zeros((1, 3, 4), np.float16))
    first, second = summarise(location)
    assert (first.fingerprint, len(first.keys), first.n_shards, first.shapes) == (ENCODER, 2, 2, {(5, 8)})
    assert (second.fingerprint, len(second.keys), second.shapes) == (OTHER, 1, {(3, 4)})
    assert first.n_bytes + second.n_bytes == sum(file.n_bytes for file in open_location(location).list())


def test_verifying_a_whole_store_finds_nothing(location: str) -> None:
    FeatureStore(location).write([A, B], features(2))
    found = verify(location)
    assert (found.n_shards, found.n_rows, found.damage) == (1, 2, ())


def test_verifying_names_the_damaged_row_and_removing_keeps_the_others(location: str) -> None:
    FeatureStore(location).write([A, B], features(2))
    flip_last_row(location)
    (damage,) = verify(location).damage
    assert damage.rows == (1,)
    assert len(verify(location, remove=True).damage) == 1
    assert verify(location).damage == ()
    store = FeatureStore(location)
    assert store.missing([A, B]) == [B]
    assert np.array_equal(store.get(A), features(2)[0])


@pytest.mark.parametrize("suffix", [ARRAY, INDEX])
def test_a_shard_without_its_array_or_with_a_broken_index_is_removed_whole(suffix: str, location: str) -> None:
    FeatureStore(location).write([A], features(1))
    place = open_location(location)
    name = next(name for name in names(location) if name.endswith(suffix))
    place.delete(name)
    if suffix == INDEX:
        place.put(name, [b"nothing"])
    assert [damage.rows for damage in verify(location, remove=True).damage] == [None]
    assert names(location) == []


def test_leftovers_of_dead_writers_go_when_they_are_old(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.write([A], features(1))
    (tmp_path / f"{ENCODER}-{'0' * 32}.npy").write_bytes(b"half of an array")
    (tmp_path / f"{ENCODER}-{'1' * 32}.npy.01234567.partial").write_bytes(b"less")
    (tmp_path / f"{'2' * 32}.json").write_text("the first format")
    (tmp_path / "somebody-elses.npy").write_bytes(b"mine")
    assert FeatureStore(tmp_path).missing([A]) == []
    assert collect_garbage(tmp_path).leftovers == 0, "a writer may still be at them"
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 90_000,) * 2)
    assert collect_garbage(tmp_path, GarbagePlan(dry_run=True)).leftovers == 3
    assert len(list(tmp_path.iterdir())) == 6
    done = collect_garbage(tmp_path)
    assert (done.leftovers, done.n_bytes) == (3, 16 + 4 + 16)
    assert (tmp_path / "somebody-elses.npy").exists()
    assert FeatureStore(tmp_path).missing([A], read=True) == []


def test_leftovers_in_an_object_store_go_too(location: str) -> None:
    open_location(location).put(f"{ENCODER}-{'0' * 32}.npy", [b"an array whose writer died"])
    assert collect_garbage(location).leftovers == 0
    assert collect_garbage(location, NOW).leftovers == 1
    assert names(location) == []


def test_small_shards_and_duplicates_become_one_shard(location: str) -> None:
    values, writers = features(4), [FeatureStore(location) for _ in range(3)]
    writers[0].write([A, B], values[:2])
    writers[1].write([B, C], values[1:3])
    writers[2].write([D], values[3:])
    reader = FeatureStore(location)
    before = sum(file.n_bytes for file in open_location(location).list())
    planned = collect_garbage(location, GarbagePlan(min_age_s=0, dry_run=True))
    assert len(names(location)) == 6, "a dry run removes nothing"
    done = collect_garbage(location, NOW)
    assert (done.duplicate_rows, done.compacted, done.made) == (1, 3, 1)
    assert (planned.duplicate_rows, planned.compacted, planned.made) == (1, 3, 1)
    assert len(names(location)) == 2
    assert sum(file.n_bytes for file in open_location(location).list()) < before
    for store in (reader, FeatureStore(location)):  # the first opened before the shards were moved
        for row, name in enumerate((A, B, C, D)):
            assert np.array_equal(store.get(name), values[row])
    assert collect_garbage(location, NOW).compacted == 0


def test_a_whole_copy_is_kept_when_the_other_is_damaged(location: str) -> None:
    FeatureStore(location).write([A], features(1))
    FeatureStore(location).write([A], features(1))
    flip_last_row(location, shard=0)
    done = collect_garbage(location, NOW)
    assert (done.duplicate_rows, done.damaged_rows) == (0, 1)
    store = FeatureStore(location)
    assert np.array_equal(store.get(A), features(1)[0])
    assert verify(location).damage == ()


def test_unwanted_encoders_go_and_others_stay(location: str) -> None:
    store = FeatureStore(location)
    store.write([A], features(1))
    store.write([key("a", OTHER)], features(1))
    young = GarbagePlan(unwanted=lambda fingerprint: fingerprint == OTHER)
    assert collect_garbage(location, young).unwanted_shards == 0
    plan = GarbagePlan(min_age_s=0, unwanted=lambda fingerprint: fingerprint == OTHER)
    assert collect_garbage(location, plan).unwanted_shards == 1
    assert [found.fingerprint for found in summarise(location)] == [ENCODER]


def test_a_reader_with_a_mapped_shard_goes_on_reading(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.write([A, B], features(2))
    assert store.get(A) is not None
    for path in tmp_path.iterdir():
        path.unlink()
    assert np.array_equal(store.get(B), features(2)[1])


def test_verifying_while_shards_are_moved_reports_no_damage(tmp_path: Path) -> None:
    ended, reported = threading.Event(), []

    def check() -> None:
        while not ended.is_set():
            reported.extend(verify(tmp_path, remove=True).damage)

    for i in range(12):
        FeatureStore(tmp_path).write([key(f"x{i}")], features(1, i))
    thread = threading.Thread(target=check)
    thread.start()
    for i in range(20):
        collect_garbage(tmp_path, NOW)
        FeatureStore(tmp_path).write([key(f"y{i}")], features(1))
    ended.set()
    thread.join()
    assert reported == []
    assert len(FeatureStore(tmp_path)) == 32


def test_readers_miss_nothing_while_shards_are_moved(location: str) -> None:
    store, lost, ended = FeatureStore(location), [], threading.Event()
    wanted = [key(f"x{i}") for i in range(12)]
    for i, name in enumerate(wanted):
        FeatureStore(location).write([name], features(1, i))
    store.refresh()

    def read() -> None:
        while not ended.is_set():
            lost.extend(name for name in wanted if store.get(name) is None)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(3):
        assert collect_garbage(location, NOW).made == 1
        FeatureStore(location).write([key(f"y{i}")], features(1))
    ended.set()
    for thread in threads:
        thread.join()
    assert lost == []
