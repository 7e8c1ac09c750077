"""Profiles and places: what is relative is settled where it was said."""

from pathlib import Path

import pytest
import yaml

from mmllm_core.config import PathSource
from mmllm_core.models.home import features_folder
from mmllm_core.models.profile import load_profile


def test_relative_paths_of_a_profile_come_back_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = load_profile("embedded").model_dump(mode="json")
    values["language"]["source"] = {"kind": "path", "path": "weights/lm"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)

    source = load_profile("mine.yaml").language.source

    assert source == PathSource(path=tmp_path / "weights" / "lm")


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ("feats", "{here}/feats"),
        ("/data/feats", "/data/feats"),
        ("s3://bucket/feats", "s3://bucket/feats"),
        ("s3:/feats", "s3:/feats"),
    ],
)
def test_a_relative_feature_store_means_the_same_place_for_workers_elsewhere(
    told: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMLLM_FEATURES", told)
    assert features_folder() == meant.format(here=tmp_path)
