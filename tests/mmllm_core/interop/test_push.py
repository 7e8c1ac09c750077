"""Pushing to the hub: against a stand-in that speaks its HTTP API, and every foreseen failure in a line."""

import socket
from pathlib import Path
from typing import Any

import pytest

from mmllm_core.errors import ExportError
from mmllm_core.interop.push import ensure_repository, push_folder
from tests.hub import COMMIT, hub, point_at

__all__ = ["hub"]  # a fixture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# It\n")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_folder_arrives_whole_in_a_private_repository(hub: Any, folder: Path) -> None:
    ensure_repository("me/model")
    assert push_folder(folder, "me/model") == COMMIT
    assert hub.repositories == {"me/model": "private"}
    assert hub.files["config.json"] == b"{}"
    assert hub.files["README.md"] == (folder / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("status", "named"), [(401, "hf auth login"), (403, "may not write"), (500, "the hub answered 500")]
)
def test_a_refusal_is_told_in_a_line(status: int, named: str, hub: Any, folder: Path) -> None:
    hub.refusal = status
    with pytest.raises(ExportError, match=named) as caught:
        ensure_repository("me/model")
    assert "\n" not in str(caught.value)
    with pytest.raises(ExportError):
        push_folder(folder, "me/model")


def test_a_hub_that_cannot_be_reached_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_at(f"http://127.0.0.1:{unused.getsockname()[1]}", monkeypatch)
        with pytest.raises(ExportError, match="check the network"):
            ensure_repository("me/model")


def test_no_token_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ExportError, match="no Hugging Face token"):
        ensure_repository("me/model")


def test_offline_mode_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE"):
        ensure_repository("me/model")


def test_a_wrong_name_is_told_in_a_line(hub: Any) -> None:
    with pytest.raises(ExportError, match="owner/name"):
        ensure_repository("me/model/more")
