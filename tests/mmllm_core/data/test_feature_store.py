"""What was stored comes back equal or not at all, wherever the store lies and whoever else is at it."""

import logging
import resource
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mmllm_core.data.feature_location import open_location
from mmllm_core.data.feature_shards import ARRAY, INDEX
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.errors import FeatureStoreError
from tests.full_disk import full_disk
from tests.mmllm_core.data.stored import ENCODER, features, key

A, B, C, D = map(key, "abcd")


def damage(location: str, suffix: str, how: str, names: Sequence[str] = ()) -> None:
    """Flip the last byte of files, cut half or all of them off, or remove them."""
    place = open_location(location)
    for name in names or [file.name for file in place.list() if file.name.endswith(suffix)]:
        data = place.read(name)
        if how == "remove":
            place.delete(name)
        else:
            damaged = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "truncate": data[: len(data) // 2], "empty": b""}
            place.put(name, [damaged[how]])


def test_stored_features_come_back_equal(location: str) -> None:
    values = features(3)
    FeatureStore(location).write([A, B, C], values)
    store = FeatureStore(location)
    assert len(store) == 3
    assert B in store
    found = store.get(B)
    assert found is not None
    assert found.dtype == np.float16
    assert np.array_equal(found, values[1])
    assert not found.flags.writeable
    assert store.get(D) is None


def test_a_shard_is_an_array_that_numpy_opens(tmp_path: Path) -> None:
    FeatureStore(tmp_path).write([A, B], features(2))
    assert np.array_equal(np.load(next(tmp_path.glob("*.npy")), mmap_mode="r"), features(2))


def test_writers_append_and_readers_see_it_after_a_refresh(location: str) -> None:
    first, second = FeatureStore(location), FeatureStore(location)
    first.write([A], features(1))
    second.write([B], features(1, 1))
    assert first.get(B) is None
    first.refresh()
    assert first.get(B) is not None
    assert first.missing([C, A, C, B]) == [C]


def test_a_store_for_one_encoder_sees_that_encoder_alone(location: str) -> None:
    other = key("a", "fedcba9876543210")
    FeatureStore(location).write([A], features(1))
    FeatureStore(location).write([other], features(1, 1))
    assert len(FeatureStore(location)) == 2
    store = FeatureStore(location, ENCODER)
    assert A in store
    assert other not in store


def test_a_key_written_twice_is_stored_once_for_readers(location: str) -> None:
    FeatureStore(location).write([A], features(1))
    FeatureStore(location).write([A], features(1))
    store = FeatureStore(location)
    assert len(store) == 1
    assert store.get(A) is not None


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "remove"])
@pytest.mark.parametrize("suffix", [ARRAY, INDEX])
def test_a_damaged_file_is_never_used_and_can_be_written_again(suffix: str, how: str, location: str) -> None:
    FeatureStore(location).write([A], features(1))
    damage(location, suffix, how)
    FeatureStore(location).write([B], features(1, 1))
    store = FeatureStore(location)
    assert store.missing([A, B], read=True) == [A]
    assert store.get(A) is None
    store.write([A], features(1, 7))
    for reader in (store, FeatureStore(location)):
        found = reader.get(A)
        assert found is not None
        assert np.array_equal(found, features(1, 7)[0])


@pytest.mark.parametrize("index", ["{", "[]", "0\n{}", ""])
def test_an_index_of_something_else_is_never_used(index: str, tmp_path: Path) -> None:
    FeatureStore(tmp_path).write([A], features(1))
    next(tmp_path.glob("*.index")).write_text(index)
    assert FeatureStore(tmp_path).missing([A]) == [A]


def test_one_flipped_row_costs_that_row_alone_and_is_reported_once(
    location: str, caplog: pytest.LogCaptureFixture
) -> None:
    FeatureStore(location).write([A, B], features(2))
    damage(location, ARRAY, "flip")
    store = FeatureStore(location)
    assert B in store, "opening reads no array"
    with caplog.at_level(logging.WARNING):
        assert store.get(B) is None
        assert store.get(B) is None
    assert len(caplog.records) == 1
    assert "row 1" in caplog.text
    assert store.missing([A, B]) == [B]
    assert store.get(A) is not None


def test_another_copy_stands_in_for_a_damaged_row(location: str) -> None:
    first, second = FeatureStore(location), FeatureStore(location)
    first.write([A, B], features(2))
    names = [file.name for file in open_location(location).list() if file.name.endswith(ARRAY)]
    second.write([A, B], features(2))
    damage(location, ARRAY, "truncate", names)
    for store in (first, FeatureStore(location)):
        first.refresh()
        for row, wanted in enumerate((A, B)):
            found = store.get(wanted)
            assert found is not None
            assert np.array_equal(found, features(2)[row])


def test_a_file_that_shrinks_under_a_reader_is_damage_and_no_crash(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.write([A, B], features(2))
    assert store.get(A) is not None
    array = next(tmp_path.glob("*.npy"))
    with array.open("r+b") as stream:
        stream.truncate(array.stat().st_size - 4)
    assert store.get(B) is None
    assert store.get(A) is not None


def test_a_reader_keeps_what_it_read_when_the_shard_is_removed(location: str) -> None:
    store = FeatureStore(location)
    store.write([A], features(1))
    found = store.get(A)
    for suffix in (INDEX, ARRAY):
        damage(location, suffix, "remove")
    store.refresh()
    assert np.array_equal(found, features(1)[0])
    assert store.get(A) is None
    assert store.missing([A]) == [A]


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ([A], features(1).astype(np.float32)),
        ([A], features(2)),
        ([A, A], features(2)),
        ([A, key("b", "another")], features(2)),
        ([], features(0)),
        ([A], features(1)[0]),
    ],
)
def test_keys_and_features_that_do_not_fit_are_refused(keys: list[str], values: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"float16|one encoder"):
        FeatureStore(tmp_path).write(keys, values)
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, numpy as np
from mmllm_core.data.feature_store import FeatureStore
location, writer, encoder = sys.argv[1:]
store = FeatureStore(location)
for i in range(20):
    store.write([f"{writer}x{i}-{encoder}", f"both{i}-{encoder}"], np.full((2, 5, 8), i, np.float16))
"""


def test_two_processes_write_while_a_reader_looks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name, ENCODER]) for name in ("one", "two")]
    reader, problems, ended = FeatureStore(tmp_path), [], threading.Event()

    def read() -> None:
        while not ended.is_set():
            reader.refresh()
            for i in range(20):
                for name in (f"onex{i}", f"twox{i}", f"both{i}"):
                    found = reader.get(key(name))
                    if found is not None and not (found == i).all():
                        problems.append(name)
                    if found is None and key(name) in reader:
                        problems.append(name)

    thread = threading.Thread(target=read)
    thread.start()
    codes = [writer.wait(timeout=60) for writer in writers]
    ended.set()
    thread.join()
    assert codes == [0, 0]
    assert problems == []
    reader.refresh()
    assert len(reader) == 60
    assert reader.missing([key(f"{name}x{i}") for name in ("one", "two") for i in range(20)], read=True) == []


FULL = """
import resource, sys, numpy as np
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.errors import EnvironmentLack
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    FeatureStore(sys.argv[1]).write([f"{i}-enc" for i in range(300)], np.zeros((300, 5, 8), np.float16))
except EnvironmentLack as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system does not limit files")
def test_a_disk_that_takes_no_more_is_a_named_error_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "cannot be written (File too large)" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_shards_of_an_object_store_are_copied_up_to_the_bound(location: str, tmp_path: Path) -> None:
    if open_location(location).local:
        pytest.skip("a local shard needs no copy")
    writer = FeatureStore(location)
    for name in (A, B, C):
        writer.write([name], features(1, ord(name[0])))
    held = 500
    store = FeatureStore(location, cache_bytes=held)
    for name in (A, B, C) * 2:
        found = store.get(name)
        assert found is not None
        assert np.array_equal(found, features(1, ord(name[0]))[0])
    copies = list((tmp_path / "mmllm-home" / "features-cache").rglob("*.npy"))
    assert 0 < sum(copy.stat().st_size for copy in copies) <= held
    damage(str(copies[0].parent), ARRAY, "flip", [copies[0].name])
    again = FeatureStore(location, cache_bytes=held)
    assert again.missing([A, B, C], read=True) == [], "a damaged copy is not a damaged shard"
    for suffix in (INDEX, ARRAY):
        damage(location, suffix, "remove")
    again.refresh()
    assert list(copies[0].parent.glob("*.npy")) == [], "copies go with their shards"


def test_where_no_copy_can_be_written_rows_are_read_from_the_object_store(location: str, tmp_path: Path) -> None:
    if open_location(location).local:
        pytest.skip("a local shard needs no copy")
    FeatureStore(location).write([A], features(1, 7))
    store = FeatureStore(location, cache_bytes=1_000_000)
    with full_disk():
        found = [store.get(A) for _ in range(2)]
    for row in found:
        assert row is not None
        assert np.array_equal(row, features(1, 7)[0])
    cache = tmp_path / "mmllm-home" / "features-cache"
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_bucket_that_does_not_exist_is_named(s3_url: str) -> None:
    with pytest.raises(FeatureStoreError, match=r"'absent'.*does not exist"):
        FeatureStore(s3_url.replace("//bucket/", "//absent/"))


def test_a_server_that_does_not_answer_is_one_named_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    url = "s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1&retry_limit=1"
    with pytest.raises(FeatureStoreError, match=r"127\.0\.0\.1:9") as caught:
        FeatureStore(url)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("url", ["s3:/bucket/x", "nosuch://bucket/x"])
def test_a_url_that_means_nothing_is_refused(url: str) -> None:
    with pytest.raises(FeatureStoreError, match="feature store"):
        FeatureStore(url)
