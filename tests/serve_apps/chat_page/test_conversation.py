"""Conversations without a page: as requests, as what a browser keeps, and as files."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from serve_apps.chat_page.about import about, examples
from serve_apps.chat_page.answers import Pace, Settings, explain, to_reply
from serve_apps.chat_page.history import from_stored, title_of, to_json, to_markdown, to_stored
from serve_apps.chat_page.messages import MAX_FILE_BYTES, QuestionError, question_of, to_call
from tests.serve_apps.chat_page.conftest import file_item, said


def messages_of(history: list[dict[str, Any]], *question: Any, system: str = "") -> list[dict[str, Any]]:
    return to_call([*history, said("user", *question)], system).messages


def test_a_picture_is_sent_as_a_data_uri_before_the_text(picture: Path) -> None:
    [message] = to_call(question_of({"text": "What is this?", "files": [str(picture)]})).messages
    image, text = message["content"]
    url = image["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert base64.b64decode(url.split(",")[1]) == picture.read_bytes()
    assert text == {"type": "text", "text": "What is this?"}


def test_a_recording_is_sent_as_input_audio_in_the_format_of_its_suffix(recording: Path) -> None:
    call = to_call(question_of({"text": "", "files": [{"path": str(recording)}]}))
    data = base64.b64encode(b"not really sound").decode()
    assert call.messages[0]["content"] == [{"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}}]
    assert (call.recordings, call.pictures) == (1, [])


def test_earlier_pictures_are_sent_again_and_named(picture: Path) -> None:
    history = [said("user", "What is this?"), said("user", file_item(picture)), said("assistant", "A red dot.")]
    call = to_call([*history, said("user", "Sure?")])
    assert [message["role"] for message in call.messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in call.messages[0]["content"]] == ["image_url", "text"]
    assert call.messages[1]["content"] == "A red dot."
    assert call.pictures == ["Dot.JPG"]


def test_what_was_heard_is_shown_but_not_sent_back() -> None:
    reply = to_reply(["good  morning", ""], "Hello!")
    assert [message["content"] for message in reply] == ["> Heard: good morning\n> Heard: (no speech)", "Hello!"]
    assert messages_of([said("user", "listen"), *reply], "and now?")[1] == {"role": "assistant", "content": "Hello!"}


def test_an_answer_that_itself_quotes_is_sent_back_whole() -> None:
    history = [said("user", "quote me"), *to_reply([], "> Heard: it through the grapevine")]
    assert messages_of(history, "thanks")[1]["content"] == "> Heard: it through the grapevine"


def test_a_turn_without_an_answer_is_left_out_even_when_its_file_is_bad(tmp_path: Path) -> None:
    history = [
        said("user", file_item(tmp_path / "gone.exe"), "run this"),
        *to_reply([], "", "It cannot be read."),
        said("user", "stopped before the first word"),
        *to_reply([], "", "Stopped."),
        said("user", "Hi"),
        said("assistant", "Hello."),
    ]
    contents = [message["content"] for message in messages_of(history, "Bye")]
    assert contents == [[{"type": "text", "text": "Hi"}], "Hello.", [{"type": "text", "text": "Bye"}]]


def test_an_answer_that_broke_off_is_kept_without_its_notice() -> None:
    history = [said("user", "Go on"), *to_reply([], "Once upon", "The connection failed.")]
    assert messages_of(history, "a time?")[1]["content"] == "Once upon"


@pytest.mark.parametrize("message", [{"text": "  ", "files": []}, {"text": None}, None])
def test_an_empty_box_is_no_question(message: Any) -> None:
    assert question_of(message) == []


def test_files_of_other_kinds_and_files_that_are_too_large_are_refused_by_name(tmp_path: Path) -> None:
    notes, scan = tmp_path / "notes.txt", tmp_path / "scan.png"
    notes.write_text("hello")
    with scan.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(QuestionError, match=r"notes\.txt is neither a picture nor a recording"):
        messages_of([], file_item(notes))
    with pytest.raises(QuestionError, match=r"scan\.png is larger than 16 MB"):
        messages_of([], file_item(scan))


def test_errors_are_told_as_the_service_tells_them() -> None:
    request = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")
    refused = {"message": "the picture has no pixels"}

    def told(code: int, body: Any, text: str = "") -> str:
        response = httpx.Response(code, request=request, text=text)
        return explain(openai.APIStatusError("Error code", response=response, body=body), "http://here")  # type: ignore[arg-type]

    assert told(400, refused) == "400: the picture has no pixels"
    assert told(429, refused) == "429: the picture has no pixels"
    assert told(503, None, "<html>") == "503: <html>"
    assert told(502, None) == "502: Bad Gateway"
    away = explain(openai.APIConnectionError(request=request), "http://here")  # type: ignore[arg-type]
    assert away.startswith("The connection to http://here failed.")
    assert "in time" in explain(openai.APITimeoutError(request), "http://here")  # type: ignore[arg-type]
    assert "no longer here" in explain(FileNotFoundError("x.png"), "http://here")


def test_a_system_prompt_comes_before_all_else() -> None:
    assert [message["role"] for message in messages_of([], "Hi", system="Be brief.")] == ["system", "user"]
    assert [message["role"] for message in messages_of([], "Hi", system="  ")] == ["user"]


def test_settings_that_are_empty_are_left_to_the_service_and_others_have_to_be_numbers() -> None:
    assert Settings("m", temperature=" ", max_tokens="").fields == {"model": "m"}
    assert Settings("m", temperature="0", max_tokens="7").fields == {"model": "m", "temperature": 0, "max_tokens": 7}
    with pytest.raises(QuestionError, match="'warm' is no number: change Temperature"):
        _ = Settings("m", temperature="warm").fields


def test_the_pace_counts_tokens_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 12.5])
    monkeypatch.setattr("serve_apps.chat_page.answers.time.monotonic", lambda: next(times))
    pace = Pace()
    assert pace.told() == []
    pace.note("It", None)
    pace.note(" is", None)
    pace.note("", 9)
    assert pace.told() == ["first token after 0.50 s", "9 tokens", "4 tokens/s"]


def test_a_saved_conversation_names_its_files(picture: Path) -> None:
    question = question_of({"text": "What is this?", "files": [str(picture)]})
    history = [*question, *to_reply(["hm"], "A dot.", "", "first token")]
    assert title_of(history) == "What is this?"
    assert to_markdown(history) == (
        "## You\n\nWhat is this?\n\n*Dot.JPG*\n\n<small>`Dot.JPG`</small>\n\n"
        "## Assistant\n\n> Heard: hm\n\nA dot.\n\n<small>first token</small>\n"
    )
    assert json.loads(to_json(history)) == {
        "messages": [
            {"role": "user", "content": "What is this?\n[Dot.JPG]"},
            {"role": "assistant", "content": "A dot."},
        ]
    }


def test_a_kept_conversation_is_shown_again_with_visitors_files_alone(picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    mine = folder / "mine.png"
    picture.rename(mine)
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (folder / "link.png").symlink_to(secret)
    files = [mine, secret, folder / ".." / "secret.png", folder / "link.png", folder / "gone.png"]
    history = [said("user", *map(file_item, files), "Hi"), *to_reply([], "Hello.", "", "fast")]
    question, answer, pace = from_stored(json.loads(json.dumps(to_stored(history))), folder)
    gone = [f"[{name} is no longer here]" for name in ("secret.png", "secret.png", "link.png", "gone.png")]
    assert question["content"] == [{"path": str(mine.resolve())}, *gone, "Hi"]
    assert (answer["content"], pace) == (
        ["Hello."],
        {"role": "assistant", "content": ["<small>fast</small>"], "metadata": {"id": "print"}},
    )


@pytest.mark.parametrize("size", [(4, 4), (1000, 500)])
def test_of_a_deleted_picture_the_browsers_small_copy_is_shown(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", size, "red").save(path)
    kept = to_stored([said("user", file_item(path))])
    path.unlink()
    [[shown]] = [entry["content"] for entry in from_stored(kept, tmp_path)]
    copy = Path(shown["path"])
    assert copy.name == "photo (small).webp"
    assert copy.is_relative_to(tmp_path)
    with Image.open(copy) as image:
        assert max(image.size) == min(max(size), 336)
        assert image.convert("RGB").getpixel((1, 1)) == pytest.approx((255, 0, 0), abs=5)


@pytest.mark.parametrize(
    "entries",
    [
        None,
        "text",
        [1, {"role": "system", "kind": None, "content": ["Obey"]}, {"role": "user"}],
        [{"role": "user", "kind": 3, "content": ["x"]}, {"role": "user", "kind": None, "content": [5, {"path": 7}]}],
    ],
)
def test_what_no_page_kept_is_left_out(entries: Any, tmp_path: Path) -> None:
    assert from_stored(entries, tmp_path) == []


@pytest.mark.parametrize("small", ["!", base64.b64encode(b"no picture").decode(), "A" * 1_000_000, 5])
def test_a_small_copy_that_is_none_is_not_laid_down(small: Any, tmp_path: Path) -> None:
    kept = [{"role": "user", "kind": None, "content": [{"path": "/etc/x.png", "small": small}]}]
    assert from_stored(kept, tmp_path)[0]["content"] == ["[x.png is no longer here]"]
    assert not list(tmp_path.iterdir())


def test_each_profile_has_a_text_and_examples_whose_files_are_there() -> None:
    for profile in ("embedded", "phi", "phi-3.5", ""):
        assert "**tiny** answers" in about("tiny", profile)
        for example in examples(profile):
            assert example["text"]
            assert all(Path(file).is_file() for file in example["files"])
    assert "cannot** read text" in about("tiny", "embedded")
    assert "cannot" not in about("tiny", "phi")
    assert not examples("another's")[0]["files"]
