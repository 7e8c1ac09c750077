"""A stand-in for the Hugging Face hub on this machine, which speaks its HTTP API as far as pushing takes it."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

COMMIT = "https://huggingface.co/me/model/commit/1"


class Hub(BaseHTTPRequestHandler):
    """Takes repositories and commits of small files, and what Spaces have besides.

    Answers `refusal` to everything where it is set.
    """

    repositories: dict[str, str]
    files: dict[str, bytes]
    settings: dict[str, dict[str, str]]
    """By `variables`, `secrets` and `hardware`."""
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
        elif (kind := self.path.rpartition("/")[2]) in self.settings:
            told = json.loads(body)
            self.settings[kind][told.get("key", "flavor")] = told.get("value", told.get("flavor"))
            runtime = {"stage": "BUILDING", "hardware": {"current": None, "requested": None}, "gcTimeout": None}
            self.answer(runtime if kind == "hardware" else self.told(kind))
        else:  # the check of a model card's header
            self.answer({"warnings": [], "errors": []})

    def do_DELETE(self) -> None:
        told = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        del self.settings[self.path.rpartition("/")[2]][told["key"]]
        self.answer({})

    def do_GET(self) -> None:
        if (kind := self.path.rpartition("/")[2]) in self.settings:
            self.answer(self.told(kind), self.refusal or 200)
        elif "/tree/" in self.path:
            self.answer([])
        else:
            self.answer({"id": "owner/model", "sha": "1" * 40, "siblings": []}, self.refusal or 200)

    def told(self, kind: str) -> dict[str, dict[str, str]]:
        return {name: {"value": value} for name, value in self.settings[kind].items()}

    def answer(self, values: Any, status: int = 200) -> None:
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
    settings: dict[str, dict[str, str]] = {"variables": {}, "secrets": {}, "hardware": {}}
    handler = type("FreshHub", (Hub,), {"repositories": {}, "files": {}, "settings": settings, "refusal": None})
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
