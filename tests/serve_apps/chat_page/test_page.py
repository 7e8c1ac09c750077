"""The page as Gradio serves it, before a small stand-in of the API."""

import asyncio
import io
import json
import socket
import threading
import time
import wave
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from gradio_client import Client, handle_file

from serve_apps.chat_page.dictation import Dictation
from serve_apps.chat_page.messages import MAX_FILE_BYTES
from serve_apps.chat_page.page import mount_chat_page


@dataclass
class StandIn:
    """A small HTTP stand-in of the streaming API with the chat page mounted beside it."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)


def chunk(**delta_or_extra: Any) -> str:
    extra = delta_or_extra.pop("perceived", {})
    choices = [{"index": 0, "delta": delta_or_extra, "finish_reason": None}]
    head = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "stand-in"}
    return f"data: {json.dumps(head | {'choices': choices} | extra)}\n\n"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = StandIn(f"http://127.0.0.1:{port}")
    app = FastAPI()

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        here.requests.append(body)
        parts = [part for message in body["messages"] for part in message["content"] if isinstance(part, dict)]
        if parts[-1].get("text") == "refuse":
            return JSONResponse({"error": {"message": "the picture has no pixels"}}, 400)
        recordings = sum(part["type"] == "input_audio" for part in parts)
        said = [f"recording {n + 1}" for n in range(recordings)]
        pictures = sum(part["type"] == "image_url" for part in parts)
        perceived = {"transcripts": said, "images": ["store"] * pictures}
        events = [
            chunk(role="assistant", content="", perceived=perceived),
            chunk(content="It is "),
            chunk(content="red."),
        ]
        return StreamingResponse(iter([*events, "data: [DONE]\n\n"]), media_type="text/event-stream")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setenv("NO_PROXY", "127.0.0.1")
        mount_chat_page(app, here.url, "stand-in")
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.05)
        yield here
        server.should_exit = server.force_exit = True  # the page's clients hold their connections open
        thread.join(timeout=20)


def ask(client: Client, history: list[dict[str, Any]], text: str, *files: Path) -> list[list[dict[str, Any]]]:
    """Every state of the conversation, as the page showed it."""
    message = {"text": text, "files": [handle_file(str(file)) for file in files]}
    job = client.submit(message, history, api_name="/chat")
    job.result(timeout=60)
    return [talked for _, talked, _, _ in job.outputs()]


def shown(talked: list[dict[str, Any]]) -> list[str]:
    """What stands in the last reply, but for how fast it came."""
    last = max(i for i, entry in enumerate(talked) if entry["role"] == "user")
    reply = [entry for entry in talked[last + 1 :] if (entry["metadata"] or {}).get("id") != "print"]
    return [entry["content"][0]["text"] for entry in reply]


def test_the_mounted_page_leaves_the_other_routes_alone_and_fetches_nothing_from_elsewhere(stand_in: StandIn) -> None:
    assert httpx.get(f"{stand_in.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{stand_in.url}/v1/models").headers["content-type"] == "application/json"
    page = httpx.get(f"{stand_in.url}/").text
    assert 'content="mmllm"' in page
    assert "fonts.googleapis" not in page
    assert httpx.get(f"{stand_in.url}/config").json()["analytics_enabled"] is False


@pytest.mark.lengthy
def test_a_conversation_streams_shows_what_was_heard_and_carries_its_history(
    stand_in: StandIn, picture: Path, recording: Path
) -> None:
    client = Client(stand_in.url, verbose=False, analytics_enabled=False)
    asked, *_, talked = ask(client, [], "What colour?", picture)
    assert asked[-1]["role"] == "user"
    assert shown(talked) == ["It is red."]
    assert "first token after" in talked[-1]["content"][0]["text"]
    assert "`Dot.JPG` reused from the store" in talked[-1]["content"][0]["text"]
    talked = ask(client, served(talked), "", recording)[-1]
    assert shown(talked) == ["> Heard: recording 1", "It is red."]
    talked = ask(client, served(talked), "", recording)[-1]
    assert shown(talked) == ["> Heard: recording 2", "It is red."]
    talked = ask(client, served(talked), "refuse")[-1]
    assert shown(talked) == ["⚠️ 400: the picture has no pixels"]
    ask(client, served(talked), "Thanks")
    messages = stand_in.requests[-1]["messages"]
    kinds = [m["content"] if m["role"] == "assistant" else [part["type"] for part in m["content"]] for m in messages]
    answer = "It is red."
    assert kinds == [["image_url", "text"], answer, ["input_audio"], answer, ["input_audio"], answer, ["text"]]
    assert stand_in.requests[-1]["model"] == "stand-in"
    assert stand_in.requests[-1]["stream"] is True


def served(talked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation for the next request: the client has fetched its files, and uploads them anew."""

    def uploaded(found: dict[str, Any]) -> dict[str, Any]:
        return found | {"file": handle_file(found["file"])} if found.get("type") == "file" else found

    conversation: list[dict[str, Any]] = json.loads(json.dumps(talked), object_hook=uploaded)
    return conversation


def send_events(page: StandIn, file: dict[str, Any]) -> list[str]:
    """Name one file in every way in which a visitor's event can, and return what came back for each."""
    ids = {dep["api_name"]: dep["id"] for dep in httpx.get(f"{page.url}/config").json()["dependencies"]}
    earlier = [{"role": "user", "content": [{"type": "file", "file": file}], "metadata": None, "options": None}]
    state: list[Any] = ["", "stand-in", "", "", "", ""]
    events: list[tuple[str, list[Any], Any]] = [
        ("chat", [{"text": "read", "files": [file]}, [], *state], None),
        ("ask_again", [earlier, *state], None),
        ("ask_edited", [earlier, *state], {"index": 0, "value": "read", "previous_value": ""}),
        ("stopped", [earlier, ""], None),
    ]
    answers = []
    for name, data, event_data in events:
        body = {"data": data, "event_data": event_data, "fn_index": ids[name], "session_hash": name}
        httpx.post(f"{page.url}/gradio_api/queue/join", json=body)
        answers.append(httpx.get(f"{page.url}/gradio_api/queue/data?session_hash={name}", timeout=60).text)
    return answers


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_a_file_that_was_not_uploaded_here_is_never_read(
    stand_in: StandIn, picture: Path, meta: dict[str, Any]
) -> None:
    before = len(stand_in.requests)
    answers = send_events(stand_in, {"path": str(picture)} | meta)
    assert all('"success":false' in answer for answer in answers), answers
    assert len(stand_in.requests) == before
    assert httpx.get(f"{stand_in.url}/gradio_api/file={picture}").status_code == 403


def test_a_file_that_was_uploaded_here_is_read(stand_in: StandIn, picture: Path) -> None:
    [path] = httpx.post(f"{stand_in.url}/gradio_api/upload", files={"files": picture.open("rb")}).json()
    answers = send_events(stand_in, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert all('"success":true' in answer for answer in answers), answers


def test_an_upload_over_the_limit_is_refused(stand_in: StandIn) -> None:
    too_much = {"files": ("big.png", b"\0" * (MAX_FILE_BYTES + 1))}
    assert httpx.post(f"{stand_in.url}/gradio_api/upload", files=too_much, timeout=60).status_code == 413


def test_what_a_service_cannot_write_down_is_asked_for_once_and_stays_a_recording(stand_in: StandIn) -> None:
    taken = Dictation()
    taken.add(48_000, np.zeros((48_000, 2), np.int16))
    client = openai.AsyncOpenAI(base_url=f"{stand_in.url}/v1", api_key="none", max_retries=0)
    assert taken.may_hear
    with pytest.raises(openai.APIStatusError):  # it has no such route
        asyncio.run(taken.hear(client))
    assert not taken.may_hear
    asyncio.run(taken.hear(client))
    with wave.open(io.BytesIO(taken.wav())) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (48_000, 48_000, 1)
