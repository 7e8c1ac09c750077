"""Uploaded files on disk: bounds, owners, time, and what a crash leaves behind."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmllm_core.errors import EnvironmentLack
from mmllm_core.vision import feature_key
from serve_apps.file_store import FileStore, NewFile, StorageFull
from serve_apps.files_config import FilesConfig
from serve_apps.stored_file import FEATURES, RECORD, FileMissing, HeardText, Seen
from tests.full_disk import full_disk

FINGERPRINT = "0123456789abcdef"
FEATURES_OF_IT = np.arange(12, dtype=np.float16).reshape(3, 4)


def image(**changes: Any) -> NewFile:
    seen = Seen(feature_key("a" * 64, FINGERPRINT), FEATURES_OF_IT)
    values: dict[str, Any] = {"content": b"bytes", "filename": "a.png", "purpose": "vision", "kind": "image"}
    return NewFile(**(values | {"perceived": seen} | changes))


def store(folder: Path, **settings: Any) -> FileStore:
    return FileStore(FilesConfig(folder=folder / "files", **settings))


def test_what_was_added_is_there_for_another_process(tmp_path: Path) -> None:
    added = store(tmp_path).of("ada").add(image())
    found = store(tmp_path).of("ada").get(added.record.id)
    assert (found.record, found.content()) == (added.record, b"bytes")
    features = found.features(FINGERPRINT)
    assert features is not None
    assert np.array_equal(features, FEATURES_OF_IT)
    assert oct((tmp_path / "files").stat().st_mode)[-3:] == "700"


def test_owners_see_their_own_alone(tmp_path: Path) -> None:
    files = store(tmp_path)
    ada, bob, nobody = (files.of(owner).add(image()).record.id for owner in ("ada", "bob", ""))
    for owner, own in (("ada", ada), ("bob", bob), ("", nobody)):
        assert [record.id for record in files.of(owner).list()] == [own]
        for other in {ada, bob, nobody} - {own}:
            with pytest.raises(FileMissing):
                files.of(owner).get(other)
            with pytest.raises(FileMissing):
                files.of(owner).delete(other)
    assert files.of("ada").get(ada).content() == b"bytes"


@pytest.mark.parametrize("owner", ["../../etc", "/", ".", "a/b", "x" * 5000, "\0", "ümlaut"])
def test_an_owners_name_never_becomes_a_path(tmp_path: Path, owner: str) -> None:
    id = store(tmp_path).of(owner).add(image()).record.id
    assert store(tmp_path).of(owner).get(id).folder.parent.parent == tmp_path / "files"


PATH_LIKE = [
    *("", "file-", "file-..", "../file.json", "file-../../../etc/passwd", "/etc/passwd", "file-" + "A" * 32),
    *(
        "file-" + "a" * 31,
        "file-" + "a" * 33,
        "file-" + "a" * 32 + "\n",
        "file-" + "a" * 30 + "/.",
        "file-\0" + "a" * 31,
    ),
    *("FILE-" + "a" * 32, "file-" + "\u0661" * 32, "%2e%2e%2f", "file-" + "a" * 100_000, ".lock", ".making-x"),
]


@pytest.mark.parametrize("id", PATH_LIKE, ids=range(len(PATH_LIKE)))
def test_an_id_that_is_none_never_reaches_the_disk(tmp_path: Path, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = store(tmp_path).of("")
    files.add(image())

    def touched(*_: Any) -> None:
        raise AssertionError("the disk was asked")

    monkeypatch.setattr("serve_apps.file_store.read_record", touched)
    with pytest.raises(FileMissing) as caught:
        files.get(id, "where")
    assert caught.value.param == "where"
    assert len(caught.value.message) < 200


def test_what_is_deleted_is_gone_from_the_disk(tmp_path: Path) -> None:
    files = store(tmp_path).of("")
    id = files.add(image()).record.id
    files.delete(id)
    with pytest.raises(FileMissing):
        files.get(id)
    left = [path for path in (tmp_path / "files").rglob("*") if path.is_file() and path.name != ".lock"]
    assert left == []


def test_a_file_that_is_deleted_while_it_is_used_does_not_come_back(tmp_path: Path) -> None:
    files = store(tmp_path).of("")
    found = files.get(files.add(image()).record.id)
    files.delete(found.record.id)
    assert found.features(FINGERPRINT) is None
    with pytest.raises(FileMissing):
        found.content()
    found.keep(Seen(feature_key("a" * 64, FINGERPRINT), FEATURES_OF_IT))
    assert not found.folder.exists()


def test_bounds_hold_when_many_upload_at_once(tmp_path: Path) -> None:
    def add(_: int) -> bool:
        try:
            store(tmp_path, max_files=5).of("").add(image())
        except StorageFull:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        added = list(pool.map(add, range(24)))
    assert added.count(True) == len(store(tmp_path).of("").list()) == 5


def test_features_count_against_the_bytes_that_are_kept(tmp_path: Path) -> None:
    files = store(tmp_path, max_bytes=4_000, max_file_bytes=3_000)
    large = image(perceived=Seen(feature_key("b" * 64, FINGERPRINT), np.zeros((50, 60), np.float16)))
    with pytest.raises(StorageFull, match="delete some"):
        files.of("").add(large)
    assert files.of("").list() == []
    files.of("").add(image())
    with pytest.raises(StorageFull) as caught:
        files.make_room(3_900)
    assert (caught.value.param, caught.value.code) == ("file", "storage_full")


def test_deleting_makes_room(tmp_path: Path) -> None:
    files = store(tmp_path, max_files=1).of("")
    id = files.add(image()).record.id
    with pytest.raises(StorageFull):
        files.add(image())
    files.delete(id)
    files.add(image())


def test_files_expire_by_the_shorter_of_two_times(tmp_path: Path) -> None:
    files = store(tmp_path, time_to_live_s=3600).of("")
    brief, usual = files.add(image(seconds=0.2)), files.add(image(seconds=1e6))
    assert usual.record.expires_at == pytest.approx(usual.record.created_at + 3600)
    time.sleep(0.25)
    assert [record.id for record in files.list()] == [usual.record.id]
    with pytest.raises(FileMissing):
        files.get(brief.record.id)
    assert not brief.folder.exists()
    assert store(tmp_path, time_to_live_s=None).of("").add(image()).record.expires_at is None


def test_who_uploads_sweeps_what_expired_and_what_a_crash_left(tmp_path: Path) -> None:
    files = store(tmp_path, max_files=2)
    files.of("gone").add(image(seconds=0.05))
    half, fresh = tmp_path / "files" / ".making-file-1", tmp_path / "files" / ".making-file-2"
    damaged = files.of("").add(image()).folder
    (damaged / RECORD).write_bytes(b"{")
    for folder in (half, fresh):
        folder.mkdir()
        (folder / "content").write_bytes(b"x")
    long_ago = time.time() - 7200
    for folder in (half, damaged):
        os.utime(folder, (long_ago, long_ago))
    time.sleep(0.1)
    files.of("").add(image())
    assert (half.exists(), fresh.exists(), damaged.exists()) == (False, True, False)
    assert files.of("gone").list() == []


def test_a_full_store_has_room_again_when_its_files_are_over(tmp_path: Path) -> None:
    files = store(tmp_path, max_files=1)
    files.of("").add(image(seconds=0.05))
    time.sleep(0.1)
    files.make_room(1)
    files.of("").add(image())
    with pytest.raises(StorageFull):
        files.make_room(1)


def test_what_another_encoder_made_is_not_used_and_makes_room_for_what_this_one_makes(tmp_path: Path) -> None:
    found = store(tmp_path).of("").add(image())
    other = "f" * 16
    assert found.features(other) is None
    found.keep(Seen(feature_key("a" * 64, other), FEATURES_OF_IT * 2))
    features = found.features(other)
    assert features is not None
    assert features[2, 3] == 22
    assert found.features(FINGERPRINT) is None
    assert len(list((found.folder / FEATURES).iterdir())) == 2


def test_damaged_features_are_not_used(tmp_path: Path) -> None:
    found = store(tmp_path).of("").add(image())
    [array] = (found.folder / FEATURES).glob("*.npy")
    data = bytearray(array.read_bytes())
    data[-3] ^= 1
    array.write_bytes(data)
    assert found.features(FINGERPRINT) is None


def sound() -> NewFile:
    return image(kind="sound", purpose="user_data", perceived=HeardText(fingerprint="one", text="Hello."))


def test_a_transcript_is_of_the_model_that_heard_it(tmp_path: Path) -> None:
    found = store(tmp_path).of("").add(sound())
    assert (found.transcript("one"), found.transcript("other")) == ("Hello.", None)
    found.keep(HeardText(fingerprint="other", text="Hallo."))
    assert (found.transcript("one"), found.transcript("other")) == (None, "Hallo.")


def test_a_full_disk_takes_no_file_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    files = store(tmp_path)
    with full_disk(), pytest.raises(EnvironmentLack, match="cannot be kept"):
        files.of("").add(image())
    assert files.of("").list() == []
    assert {path.name for path in (tmp_path / "files").iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("new", "anew"),
    [
        (image(), Seen(feature_key("a" * 64, "f" * 16), FEATURES_OF_IT)),
        (sound(), HeardText(fingerprint="other", text="Hallo.")),
    ],
)
def test_a_full_disk_costs_only_what_was_computed_anew(tmp_path: Path, new: NewFile, anew: Seen | HeardText) -> None:
    found = store(tmp_path).of("").add(new)
    with full_disk():
        found.keep(anew)
    assert found.content() == b"bytes"
    assert found.features("f" * 16) is None
    assert found.transcript("other") is None
    left = [path.name for path in found.folder.rglob("*") if path.is_file()]
    assert sorted(name for name in left if name not in {"content", RECORD, "transcript.json"}) == []


def test_a_folder_that_cannot_be_written_is_one_named_error(tmp_path: Path) -> None:
    (tmp_path / "files").write_text("a file where the folder should be")
    with pytest.raises(EnvironmentLack, match="cannot be kept"):
        store(tmp_path).of("").add(image())
