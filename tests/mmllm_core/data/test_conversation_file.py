"""Rows of every shape become conversations; what cannot be learned from is named with file and row."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmllm_core.conversation import ImagePart, Message, SpeechPart, TextPart
from mmllm_core.data import conversation_file
from mmllm_core.data.conversation_file import file_rows, memory_mapped, streamed, tell_format
from mmllm_core.data.rows import row_of, sample_of
from mmllm_core.data.sample import Sample
from mmllm_core.errors import DataError
from mmllm_core.models.home import home
from tests.mmllm_core.data.conftest import WriteFile, chat, llava

IMAGE = ImagePart()


def only(path: Path, images: Path | None = None) -> Sample:
    (row,) = file_rows(path, tell_format(path))
    return sample_of(row, source="s", images=images)


def user(*parts: str | ImagePart) -> Message:
    return Message("user", tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<image>\nWhat?", user(IMAGE, "What?")),
        ("What?\n<image>", user("What?", IMAGE)),
        ("<image>", user(IMAGE)),
        ("In <image> here?", user("In", IMAGE, "here?")),
    ],
)
def test_a_placeholder_is_an_image_wherever_it_stands(write: WriteFile, text: str, message: Message) -> None:
    assert only(write([llava("1", text, "This.", image="a.png")])).messages[0] == message


def test_turns_follow_each_other(write: WriteFile) -> None:
    sample = only(write([llava("7", "<image>\nOne?", "1", "Two?", "2", image="a.png")]), Path("/im"))
    assert sample.id == "s/1:7"
    assert sample.images == (Path("/im/a.png"),)
    assert [m.role for m in sample.messages] == ["user", "assistant", "user", "assistant"]
    assert sample.messages[2] == user("Two?")


def test_several_images_belong_to_placeholders_in_order(write: WriteFile) -> None:
    rows = [llava("1", "<image>\n<image>\nBoth?", "Yes.", "And <image>?", "No.", image=["a", "b", "c"])]
    sample = only(write(rows), Path("/im"))
    assert [path.name for path in sample.images] == ["a", "b", "c"]
    assert sample.messages[0] == user(IMAGE, IMAGE, "Both?")
    assert sample.messages[2] == user("And", IMAGE, "?")


@pytest.mark.parametrize(
    "row", [llava("1", "What is <image>?", "A tag."), llava("1", "What is <image>?", "A tag.") | {"image": None}]
)
def test_without_images_a_placeholder_is_text(write: WriteFile, row: dict[str, Any]) -> None:
    sample = only(write([row]))
    assert sample.images == ()
    assert sample.messages[0] == user("What is <image>?")


def test_a_null_image_beside_a_list_of_images_hides_nothing(write: WriteFile) -> None:
    sample = only(write([llava("1", "<image>\nWhat?", "A tag.") | {"image": None, "images": ["a.png"]}]))
    assert [path.name for path in sample.images] == ["a.png"]


def test_what_the_assistant_says_is_never_an_image(write: WriteFile) -> None:
    sample = only(write([llava("1", "<image>\nWhich tag?", "Write <image>.", image="a.png")]))
    assert sample.messages[1] == Message.text("assistant", "Write <image>.")


def test_a_system_turn_may_lead(write: WriteFile) -> None:
    row = llava("1", "Hi", "Ho")
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert only(write([row])).messages[0] == Message.text("system", "Be brief.")


def test_chat_content_is_text_or_a_list_of_text_parts(write: WriteFile) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two <image>"}]
    sample = only(write([chat(parts, "Yes.", system="Be brief.")], "chat.jsonl"))
    assert [m.role for m in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[1] == user("One\ntwo <image>")


def test_llava_rows_may_come_as_lines(write: WriteFile) -> None:
    assert only(write([llava("1", "<image> A?", "B", image="a.png")], "rows.jsonl")).messages[0] == user(IMAGE, "A?")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (llava("1", "No placeholder", "x", image="a.png"), "1 images and 0 placeholders"),
        (llava("1", "<image> <image>", "x", image="a.png"), "1 images and 2 placeholders"),
        (llava("1", "<image>", "<image>", image=["a", "b"]), "2 images and 1 placeholders"),
        (llava("1", "<image>", " \n", image="a.png"), "empty turn: turn 2"),
        (llava("1", "Hi"), "no answer follows"),
        (llava("1"), "no turns"),
        (llava("1", "Hi", "Ho") | {"image": 3}, "'image' must be"),
        (llava("1", "Hi", "Ho") | {"image": ""}, "'image' must be"),
        (llava("1", "Hi", "caf\udce9"), "not UTF-8"),
        ({"conversations": "none"}, "list of turns"),
        ({"conversations": [{"from": "cat", "value": "Hi"}]}, "'cat'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversations.0"),
        ([1], "expected an object"),
        (chat("Hi", [{"type": "image_url", "image_url": {}}]), "'conversations' must"),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_named(write: WriteFile, row: Any, named: str) -> None:
    path = write([llava("0", "fine", "yes"), row])
    with pytest.raises(DataError, match=named) as caught:
        list(file_rows(path, "llava"))
    assert f"{path}: row 2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (chat("Hi", [{"type": "image_url", "image_url": {}}]), "messages.1.content"),
        (chat("Hi", None), "messages.1.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
        ({"messages": {}}, "list of messages"),
        ({"messages": ["Hi"]}, "messages.0"),
    ],
)
def test_a_chat_row_that_cannot_be_read_is_named(write: WriteFile, row: Any, named: str) -> None:
    path = write([chat("fine", "yes"), row], "chat.jsonl")
    with pytest.raises(DataError, match=named):
        list(file_rows(path, "chat"))


def test_a_file_of_no_known_format_is_refused(write: WriteFile) -> None:
    with pytest.raises(DataError, match="'conversations'"):
        tell_format(write([{"question": "what?"}]))


def test_a_mapped_table_and_a_stream_hold_the_rows_of_the_file(write: WriteFile) -> None:
    path = write([llava(str(i), f"<image>\nQuestion {i} é猫?", f"Answer {i}", image=f"{i}.png") for i in range(2500)])
    rows = list(file_rows(path, "llava"))
    assert list(memory_mapped(path, "llava")) == rows
    assert list(streamed(path, "llava")) == rows


def test_a_file_is_converted_once_by_its_content(write: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [llava("1", "Hi", "Ho")]
    memory_mapped(write(rows, "one.json"), "llava")
    monkeypatch.setattr(conversation_file, "_write_arrow", lambda *_: pytest.fail("converted again"))
    assert len(memory_mapped(write(rows, "moved.json"), "llava")) == 1


def test_a_changed_file_is_converted_anew(write: WriteFile) -> None:
    memory_mapped(write([llava("1", "Hi", "Ho")]), "llava")
    assert memory_mapped(write([llava("1", "Hi", "Hum")]), "llava")[0]["messages"][1]["parts"][0]["text"] == "Hum"


def test_a_refused_file_leaves_no_table_behind(write: WriteFile) -> None:
    with pytest.raises(DataError, match="row 2"):
        memory_mapped(write([llava("1", "Hi", "Ho"), llava("2", "Hi")]), "llava")
    assert [path.suffix for path in (home() / "data" / "rows").iterdir()] == [".lock"]


def test_a_table_is_mapped_and_not_read(write: WriteFile) -> None:
    import pyarrow as pa

    path = write([llava(str(i), "Question " * 200, "Answer " * 200) for i in range(3000)])
    before = pa.total_allocated_bytes()
    dataset = memory_mapped(path, "llava")
    assert dataset[2999]["id"] == "3000:2999"
    assert pa.total_allocated_bytes() - before < path.stat().st_size / 10


TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1)
PARTS = st.one_of(st.builds(TextPart, TEXTS), st.builds(ImagePart), st.builds(SpeechPart, TEXTS))


@given(st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.lists(PARTS).map(tuple))))
def test_rows_hold_all_of_a_conversation(messages: list[Message]) -> None:
    sample = sample_of(row_of("r", ["a.png"], messages), source="s", images=Path("/im"))
    assert sample == Sample("s/r", (Path("/im/a.png"),), tuple(messages))
