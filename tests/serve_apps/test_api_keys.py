import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mmllm_core.errors import ConfigError
from serve_apps.api_keys import ApiKey, KeyRing, add_key, hashed, read_keys, remove_key
from tests.full_disk import full_disk


def named(id: str, **fields: object) -> ApiKey:
    return ApiKey.model_validate({"id": id, "sha256": "0" * 64} | fields)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "keys.yaml"


def test_a_key_is_found_by_its_holder_and_kept_as_a_hash(path: Path) -> None:
    alice, bob = add_key(path, named("alice", requests_per_minute=5)), add_key(path, named("bob"))
    ring = KeyRing(path)
    found = ring.find(alice)
    assert found is not None
    assert (found.id, found.requests_per_minute, found.sha256) == ("alice", 5, hashed(alice))
    assert [key.id for key in read_keys(path)] == ["alice", "bob"]
    assert alice not in path.read_text()
    assert bob not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("wrong", ["", "mmllm-", "alice", "0" * 64, "\udcff", "é", "mmllm-" + "x" * 10_000])
def test_nothing_else_is_a_key(path: Path, wrong: str) -> None:
    secret = add_key(path, named("alice"))
    ring = KeyRing(path)
    for given in (wrong, secret[:-1], secret + "x", secret.upper(), hashed(secret)):
        assert ring.find(given) is None


def test_changes_of_the_file_are_seen(path: Path) -> None:
    alice = add_key(path, named("alice"))
    ring = KeyRing(path)
    bob = add_key(path, named("bob"))
    assert ring.find(bob) is not None
    remove_key(path, "alice")
    assert ring.find(alice) is None


def test_a_file_that_breaks_costs_nobody_their_key(path: Path) -> None:
    secret = add_key(path, named("alice"))
    ring = KeyRing(path)
    path.write_text("keys: [")
    assert ring.find(secret) is not None
    path.unlink()
    assert ring.find(secret) is not None
    other = add_key(path, named("bob"))
    assert ring.find(secret) is None
    assert ring.find(other) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: [{id: a}]", "sha256"),
        ("keys: [{id: a, sha256: abc}]", "sha256"),
        (f"keys: [{{id: a, sha256: '{'0' * 64}', limit: 3}}]", "limit"),
        (f"keys: [{{id: ../a, sha256: '{'0' * 64}'}}]", "id"),
        (f"keys: [{{id: a, sha256: '{'0' * 64}'}}, {{id: a, sha256: '{'1' * 64}'}}]", "'a' is there twice"),
        ("- a", "mapping"),
        ("keys: {", "YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(path: Path, text: str, message: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        KeyRing(path)


def test_a_missing_file_and_double_and_unknown_names_are_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        KeyRing(path)
    add_key(path, named("alice"))
    with pytest.raises(ConfigError, match="there is a key 'alice' already"):
        add_key(path, named("alice"))
    with pytest.raises(ConfigError, match="no key 'bob': it holds alice"):
        remove_key(path, "bob")


def test_a_full_disk_leaves_the_keys_as_they_were(path: Path) -> None:
    alice = add_key(path, named("alice"))
    before = sorted(path.parent.iterdir())
    with full_disk(), pytest.raises(ConfigError, match="cannot be written"):
        add_key(path, named("bob"))
    assert KeyRing(path).find(alice) is not None
    assert sorted(path.parent.iterdir()) == before


def test_a_folder_that_cannot_be_made_is_named(path: Path) -> None:
    path.parent.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=f"{path.parent}: cannot be written"):
        add_key(path, named("alice"))


def test_expiry_is_in_utc_whatever_zone_it_is_written_in() -> None:
    now = datetime.now(UTC)
    assert named("a", expires=now - timedelta(seconds=1)).has_expired
    assert not named("a", expires=now + timedelta(minutes=1)).has_expired
    assert named("a", expires=(now - timedelta(minutes=1)).replace(tzinfo=None)).has_expired
    assert not named("a").has_expired
