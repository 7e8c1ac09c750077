"""`mmllm space deploy`: against a stand-in for the hub, and its refusals."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from mmllm_core.bundle import Bundle
from mmllm_core.errors import MmllmError
from tests.hub import COMMIT, hub
from tests.serve_apps.conftest import bundle

__all__ = ["bundle", "hub"]  # fixtures


def deploy(*options: str) -> str:
    ran = CliRunner().invoke(app, ["space", "deploy", "--repo", "me/shapes", *options])
    if isinstance(ran.exception, MmllmError):
        raise ran.exception
    assert ran.exit_code == 0, ran.output
    return ran.output


def test_a_bundle_goes_up_with_the_program_into_a_private_space(hub: Any, bundle: Bundle) -> None:
    hub.settings["variables"]["MMLLM_BASE_URL"] = "https://left.over"
    hub.settings["secrets"]["MMLLM_API_KEY"] = "left over"
    assert COMMIT in deploy("--bundle", str(bundle.folder), "--hardware", "zero-a10g")
    assert hub.repositories == {"me/shapes": "private"}
    assert {
        "app.py",
        "README.md",
        "requirements.txt",
        "bundle/manifest.json",
        "serve_apps/chat_page/page.py",
    } <= hub.files.keys()
    assert hub.settings == {"variables": {}, "secrets": {}, "hardware": {"flavor": "zero-a10g"}}


def test_a_service_elsewhere_is_a_variable_and_its_key_a_secret(hub: Any) -> None:
    deploy("--base-url", "https://my.host/v1", "--api-key", "sk-1", "--public")
    assert hub.repositories == {"me/shapes": "public"}
    assert hub.settings["variables"] == {"MMLLM_BASE_URL": "https://my.host"}
    assert hub.settings["secrets"] == {"MMLLM_API_KEY": "sk-1"}
    assert not any(name.startswith("bundle/") or b"sk-1" in content for name, content in hub.files.items())


def test_a_dry_run_writes_the_folder_and_tells_the_variables(tmp_path: Path) -> None:
    told = deploy("--bundle", "me/bundle@v1", "--dry-run", "--out", str(tmp_path / "space"))
    assert "variable MMLLM_BUNDLE=me/bundle@v1" in told
    assert (tmp_path / "space" / "app.py").is_file()
    assert not (tmp_path / "space" / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dry-run"], "--out"),
        (["--bundle", "no folder"], "neither a folder nor a repository"),
        (["--bundle", "me/bundle", "--base-url", "https://c"], "one of them"),
        (["--api-key", "k"], "MMLLM_BASE_URL"),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_made(options: list[str], named: str, hub: Any) -> None:
    with pytest.raises(MmllmError, match=named):
        deploy(*options)
    assert hub.repositories == {}
