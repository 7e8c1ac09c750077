"""`mmllm features` tells the truth about the store and removes only what it says."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.errors import BundleError, FeatureStoreError
from mmllm_core.models.home import features_folder, home

USED, UNUSED = "0123456789abcdef", "fedcba9876543210"
NOW = ("--min-age-hours", "0")


@pytest.fixture(autouse=True)
def _store_and_bundle() -> None:
    """A store with two encoders, of which a bundle uses one."""
    store = FeatureStore(features_folder())
    store.write([f"a-{USED}", f"b-{USED}"], np.ones((2, 5, 8), np.float16))
    store.write([f"c-{USED}"], np.ones((1, 5, 8), np.float16))
    store.write([f"a-{UNUSED}"], np.ones((1, 2, 4), np.float16))
    (home() / "bundles" / "parrot").mkdir(parents=True)
    (home() / "bundles" / "parrot" / "bundle.json").write_text(json.dumps({"feature_fingerprint": USED}))


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["features", *arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def rows(output: str) -> dict[str, list[str]]:
    """Lines of a table by their first word."""
    return {line.split()[0]: line.split() for line in output.splitlines() if line.split()}


def test_list_shows_encoders_and_who_uses_them() -> None:
    code, output = run("list")
    assert code == 0
    table = rows(output)
    assert table[USED][1] == "3"
    assert table[USED][-1] == "parrot"
    assert table[USED][-5:-1] == ["5", "x", "8", "2"]
    assert table[UNUSED][1] == "1"
    assert "no bundle here" in output


def test_verify_fails_where_there_is_damage_and_mends_it_on_demand() -> None:
    assert run("verify")[0] == 0
    array = max(Path(features_folder()).glob(f"{USED}-*.npy"), key=lambda path: path.stat().st_size)
    array.write_bytes(array.read_bytes()[:-1] + b"x")
    code, output = run("verify")
    assert code == 1
    assert array.stem in output
    assert "1 of 2 rows" in output
    assert run("verify", "--remove")[0] == 1
    assert run("verify")[0] == 0
    assert len(FeatureStore(features_folder())) == 3


def test_gc_says_what_would_go_and_then_removes_it() -> None:
    before = sorted(Path(features_folder()).iterdir())
    code, output = run("gc", "--unused", "--dry-run", *NOW)
    assert code == 0
    assert "would be freed" in output
    assert sorted(Path(features_folder()).iterdir()) == before
    _, output = run("gc", "--unused", *NOW)
    assert "2 into 1" in output
    store = FeatureStore(features_folder())
    assert store.missing([f"{name}-{USED}" for name in "abc"], read=True) == []
    assert store.missing([f"a-{UNUSED}"]) == [f"a-{UNUSED}"]


def test_gc_leaves_alone_what_is_young() -> None:
    before = sorted(Path(features_folder()).iterdir())
    run("gc", "--unused")
    assert sorted(Path(features_folder()).iterdir()) == before


def test_gc_keeps_the_encoders_that_are_named() -> None:
    run("gc", "--keep", UNUSED, *NOW)
    store = FeatureStore(features_folder())
    assert f"a-{UNUSED}" in store
    assert f"a-{USED}" not in store


def test_gc_refuses_to_keep_what_is_not_there() -> None:
    with pytest.raises(FeatureStoreError, match="features list"):
        run("gc", "--keep", "0" * 16, *NOW)


def test_gc_of_the_unused_stops_at_a_bundle_that_cannot_be_read() -> None:
    (home() / "bundles" / "parrot" / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match=r"bundle\.json"):
        run("gc", "--unused", *NOW)
    assert len(FeatureStore(features_folder())) == 4


def test_another_store_can_be_named(tmp_path: Path) -> None:
    code, output = run("list", "--store", str(tmp_path / "empty"))
    assert code == 0
    assert "nothing is stored" in output
