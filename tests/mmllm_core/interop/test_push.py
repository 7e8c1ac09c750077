"""Pushing to the hub: against a stand-in that speaks its HTTP API, and every foreseen failure in a line."""

import base64
import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from mmllm_core.errors import ExportError
from mmllm_core.interop.push import ensure_repository, push_folder

COMMIT = "https://huggingface.co/me/model/commit/1"


class Hub(BaseHTTPRequestHandler):
    """Takes repositories and commits of small files; answers `refusal` to everything where it is set."""

    repositories: dict[str, str]
    files: dict[str, bytes]
    refusal: int | None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refusal:
            self.answer({"error": "no"}, self.refusal)
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            type(self).repositories[repo] = wanted["visibility"]
            self.answer({"url": f"https://huggingface.co/{repo}"})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer({"files": [f | {"shouldIgnore": False, "oid": None} for f in files]})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    type(self).files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitUrl": COMMIT, "commitOid": "1", "pullRequestUrl": None})
        else:  # the check of a model card's header
            self.answer({"warnings": [], "errors": []})

    def do_GET(self) -> None:
        self.answer({"id": "owner/model", "sha": "1" * 40, "siblings": []}, self.refusal or 200)

    def answer(self, values: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine that huggingface_hub talks to, with a token."""
    handler = type("FreshHub", (Hub,), {"repositories": {}, "files": {}, "refusal": None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield handler
    server.shutdown()
    server.server_close()


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")


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
