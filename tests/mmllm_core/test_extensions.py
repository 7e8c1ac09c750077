"""What other packages add: found by name, and told by name where it cannot be had."""

from pathlib import Path

import pytest

from mmllm_core.config import MlpConfig, Profile, connector_kinds, parse_config
from mmllm_core.errors import ConfigError
from mmllm_core.extensions import extension_names, load_extension
from mmllm_core.models.profile import load_profile
from serve_apps.config_files import load_serve_config


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that adds a connector that is there, one that is not, and an engine; another adds the first again."""
    points = {
        "one": "[mmllm.connectors]\nours = mmllm_core.config:MlpConfig\nlost = nowhere.at_all:Config\n"
        "twice = mmllm_core.config:MlpConfig\n[mmllm.engines]\nown = mmllm_core.engine:Engine\n",
        "two": "[mmllm.connectors]\ntwice = mmllm_core.config:MlpConfig\n",
    }
    for name, text in points.items():
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("installed")
def test_what_a_package_adds_is_found() -> None:
    assert {"lost", "ours", "twice"} <= set(extension_names("mmllm.connectors"))
    assert {"ours", "mlp"} <= set(connector_kinds())
    assert load_extension("mmllm.connectors", "ours") is MlpConfig
    assert load_serve_config("embedded", {"phi.engine": "own"}).phi.engine == "own"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lost", "'connector': 'lost' of mmllm.connectors: nowhere.at_all:Config cannot be imported"),
        ("twice", "'twice' is added to mmllm.connectors by one, two: one must do so"),
    ],
)
def test_what_cannot_be_had_is_told_by_name(kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(Profile, load_profile("embedded").model_dump() | {"connector": {"kind": kind}}, "test")


@pytest.mark.usefixtures("installed")
def test_an_engine_of_another_package_shares_no_lm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapters are for the engines transformers and vllm, and engine is own"):
        load_serve_config("embedded", {"phi.engine": "own", "phi.adapters": {"a": str(tmp_path)}})


def test_an_engine_that_nobody_adds_is_refused() -> None:
    with pytest.raises(ConfigError, match="'llamacpp' is unknown: choose one of transformers, vllm"):
        load_serve_config("embedded", {"phi.engine": "llamacpp"})
