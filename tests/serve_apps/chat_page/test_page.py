import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from gradio_client import Client, handle_file
from PIL import Image

from serve_apps.chat_page.answers import Pace, explain, to_reply
from serve_apps.chat_page.history import kept, to_json, to_markdown
from serve_apps.chat_page.messages import MAX_FILE_BYTES, QuestionError, to_messages
from serve_apps.chat_page.page import mount_chat_page


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "Dot.JPG"
    Image.new("RGB", (4, 4), "red").save(path, "JPEG")
    return path


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "voice.mp3"
    path.write_bytes(b"not really sound")
    return path


def file_item(path: Path) -> dict[str, Any]:
    return {"type": "file", "file": {"path": str(path)}, "alt_text": None}


def text_item(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def said(role: str, *content: Any, kind: str | None = None) -> dict[str, Any]:
    return {"role": role, "content": list(content), "metadata": {"id": kind} if kind else None}


def test_a_picture_is_sent_as_a_data_uri_before_the_text(picture: Path) -> None:
    [message] = to_messages([], {"text": "What is this?", "files": [str(picture)]})
    image, text = message["content"]
    url = image["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert base64.b64decode(url.split(",")[1]) == picture.read_bytes()
    assert text == {"type": "text", "text": "What is this?"}


def test_a_recording_is_sent_as_input_audio_in_the_format_of_its_suffix(recording: Path) -> None:
    [message] = to_messages([], {"text": "", "files": [str(recording)]})
    [part] = message["content"]
    data = base64.b64encode(b"not really sound").decode()
    assert part == {"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}}


def test_a_retried_message_brings_its_files_as_dicts(picture: Path) -> None:
    [message] = to_messages([], {"text": "Again", "files": [{"path": str(picture)}]})
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]


@pytest.mark.parametrize("wrap", [lambda path: file_item(path), lambda path: {"path": str(path)}])
def test_earlier_pictures_are_sent_again(picture: Path, wrap: Any) -> None:
    history = [said("user", wrap(picture), "What is this?"), said("assistant", text_item("A red dot."))]
    messages = to_messages(history, {"text": "Sure?", "files": []})
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "text"]
    assert messages[1]["content"] == "A red dot."


def test_what_was_heard_is_shown_but_not_sent_back() -> None:
    reply = to_reply(["good  morning", ""], "Hello!")
    assert [message["content"] for message in reply] == ["> Heard: good morning\n> Heard: (no speech)", "Hello!"]
    messages = to_messages([said("user", "listen"), *reply], {"text": "and now?"})
    assert messages[1] == {"role": "assistant", "content": "Hello!"}


def test_an_answer_that_itself_quotes_is_sent_back_whole() -> None:
    history = [said("user", "quote me"), *to_reply([], "> Heard: it through the grapevine")]
    assert to_messages(history, {"text": "thanks"})[1]["content"] == "> Heard: it through the grapevine"


def test_a_turn_without_an_answer_is_left_out_even_when_its_file_is_bad(tmp_path: Path) -> None:
    history = [
        said("user", file_item(tmp_path / "gone.exe"), "run this"),
        *to_reply([], "", "It cannot be read."),
        said("user", "stopped before the first word"),
        said("user", "Hi"),
        said("assistant", "Hello."),
    ]
    messages = to_messages(history, {"text": "Bye"})
    assert [message["content"] for message in messages] == [[text_item("Hi")], "Hello.", [text_item("Bye")]]


def test_an_answer_that_broke_off_is_kept_without_its_notice() -> None:
    history = [said("user", "Go on"), *to_reply([], "Once upon", "The connection failed.")]
    assert to_messages(history, {"text": "a time?"})[1]["content"] == "Once upon"


@pytest.mark.parametrize("message", [{"text": "  ", "files": []}, {"text": None}])
def test_an_empty_question_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(QuestionError, match="Type a question"):
        to_messages([], message)


def test_files_of_other_kinds_and_files_that_are_too_large_are_refused_by_name(tmp_path: Path) -> None:
    notes, scan = tmp_path / "notes.txt", tmp_path / "scan.png"
    notes.write_text("hello")
    with scan.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(QuestionError, match=r"notes\.txt is neither a picture nor a recording"):
        to_messages([], {"text": "", "files": [str(notes)]})
    with pytest.raises(QuestionError, match=r"scan\.png is larger than 16 MB"):
        to_messages([], {"text": "", "files": [str(scan)]})


def test_errors_are_explained_for_a_person() -> None:
    request = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")
    refused: Any = {"message": "the picture has no pixels"}

    def status(code: int, body: Any = None) -> openai.APIStatusError:
        return openai.APIStatusError("Error code", response=httpx.Response(code, request=request), body=body)  # type: ignore[arg-type]

    assert "too long" in explain(openai.APITimeoutError(request))  # type: ignore[arg-type]
    assert "connection" in explain(openai.APIConnectionError(request=request))  # type: ignore[arg-type]
    assert "busy" in explain(status(503))
    assert explain(status(400, refused)) == "The assistant could not answer: the picture has no pixels"
    assert "could not answer this" in explain(status(500, "<html>"))
    assert "no longer here" in explain(FileNotFoundError("/tmp/x.png"))


def test_a_system_prompt_comes_before_all_else() -> None:
    messages = to_messages([], {"text": "Hi"}, "Be brief.")
    assert [message["role"] for message in messages] == ["system", "user"]
    assert [message["role"] for message in to_messages([], {"text": "Hi"}, "  ")] == ["user"]


def test_the_pace_counts_tokens_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 12.5])
    monkeypatch.setattr("serve_apps.chat_page.answers.time.monotonic", lambda: next(times))
    pace = Pace()
    assert pace.told() == ""
    pace.note("It", None)
    pace.note(" is", None)
    pace.note("", 9)
    assert pace.told() == "first word after 0.50 s · 9 tokens · 4 tokens/s"


def test_a_saved_conversation_names_its_files(picture: Path) -> None:
    history = [said("user", file_item(picture), "What is this?"), *to_reply(["hm"], "A dot.", "", "first word")]
    assert to_markdown(history) == (
        "## You\n\n*Dot.JPG*\n\nWhat is this?\n\n## Assistant\n\n> Heard: hm\n\nA dot.\n\n<small>first word</small>\n"
    )
    assert json.loads(to_json(history)) == {
        "messages": [
            {"role": "user", "content": "[Dot.JPG]\nWhat is this?"},
            {"role": "assistant", "content": "A dot."},
        ]
    }


def test_a_kept_conversation_shows_visitors_files_alone(picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    mine = folder / "mine.png"
    picture.rename(mine)
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (folder / "link.png").symlink_to(secret)
    files = [mine, secret, folder / ".." / "secret.png", folder / "link.png", folder / "gone.png"]
    [shown_again] = kept([said("user", *map(file_item, files), "Hi")], folder)
    gone = [f"[{name} is no longer here]" for name in ("secret.png", "secret.png", "link.png", "gone.png")]
    assert shown_again["content"] == [
        {"type": "file", "file": {"path": str(mine.resolve())}},
        *(text_item(text) for text in [*gone, "Hi"]),
    ]


@dataclass
class StandIn:
    """A small HTTP stand-in of the streaming API with the chat page mounted beside it."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)


def chunk(**delta_or_extra: Any) -> str:
    extra = {"transcripts": delta_or_extra.pop("transcripts")} if "transcripts" in delta_or_extra else {}
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
        events = [chunk(role="assistant", content="", transcripts=said), chunk(content="It is "), chunk(content="red.")]
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


def ask(client: Client, text: str, *files: Path) -> list[list[dict[str, Any]]]:
    """Every state of the answer, as the page showed it."""
    job = client.submit({"text": text, "files": [handle_file(str(file)) for file in files]}, api_name="/chat")
    job.result(timeout=60)
    return job.outputs()


def shown(reply: list[dict[str, Any]]) -> list[str]:
    """What stands in a reply, but for how fast it came."""
    return [message["content"] for message in reply if message.get("metadata", {}).get("id") != "print"]


def test_the_mounted_page_leaves_the_other_routes_alone_and_fetches_nothing_from_elsewhere(stand_in: StandIn) -> None:
    assert httpx.get(f"{stand_in.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{stand_in.url}/v1/models").headers["content-type"] == "application/json"
    page = httpx.get(f"{stand_in.url}/").text
    assert 'content="mmllm"' in page
    assert "fonts.googleapis" not in page
    assert httpx.get(f"{stand_in.url}/config").json()["analytics_enabled"] is False


def test_a_conversation_streams_shows_what_was_heard_and_carries_its_history(
    stand_in: StandIn, picture: Path, recording: Path
) -> None:
    client = Client(stand_in.url, verbose=False, analytics_enabled=False)
    states = ask(client, "What colour?", picture)
    assert [shown(state) for state in states[-3:]] == [["It is "], ["It is red."], ["It is red."]]
    assert "first word after" in states[-1][-1]["content"]
    assert shown(ask(client, "", recording)[-1]) == ["> Heard: recording 1", "It is red."]
    assert shown(ask(client, "", recording)[-1]) == ["> Heard: recording 2", "It is red."]
    assert shown(ask(client, "refuse")[-1]) == ["⚠️ The assistant could not answer: the picture has no pixels"]
    ask(client, "Thanks")
    messages = stand_in.requests[-1]["messages"]
    kinds = [m["content"] if m["role"] == "assistant" else [part["type"] for part in m["content"]] for m in messages]
    answer = "It is red."
    assert kinds == [["image_url", "text"], answer, ["input_audio"], answer, ["input_audio"], answer, ["text"]]
    assert stand_in.requests[-1]["model"] == "stand-in"
    assert stand_in.requests[-1]["stream"] is True


def send_events(page: StandIn, file: dict[str, Any]) -> list[str]:
    """Name one file in every way in which a visitor's event can, and return what came back for each."""
    ids = {dep["api_name"]: dep["id"] for dep in httpx.get(f"{page.url}/config").json()["dependencies"]}
    earlier = [{"role": "user", "content": [{"type": "file", "file": file}], "metadata": None, "options": None}]
    example = {"index": 0, "value": {"text": "read", "files": [file]}}
    events: list[tuple[str, list[Any], Any]] = [
        ("chat", [{"text": "read", "files": [file]}, None, "stand-in", "", None, None, ""], None),
        ("_pop_last_user_message_1", [earlier], None),
        ("example_clicked", [], example),
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
