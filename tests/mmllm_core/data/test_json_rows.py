"""Values come one by one from arrays and lines, whatever marks, newlines and bytes the file has."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm_core.data import json_rows
from mmllm_core.data.json_rows import read_rows
from mmllm_core.errors import DataError

VALUES: list[Any] = [{"a": 'quote " and \\ slash'}, {"b": [1, {"c": "[],{}"}]}, "é 猫", 12, None]


def values(path: Path) -> list[Any]:
    return [row.value for row in read_rows(path)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_and_lines_are_read_with_either_newline_and_with_a_mark(
    file: Path, newline: str, mark: bytes, indent: int | None
) -> None:
    file.write_bytes(mark + json.dumps(VALUES, indent=indent, ensure_ascii=False).replace("\n", newline).encode())
    assert values(file) == VALUES
    file.write_bytes(mark + newline.join(json.dumps(value, ensure_ascii=False) for value in VALUES).encode())
    assert values(file) == VALUES


@given(rows=st.lists(st.recursive(st.text() | st.integers() | st.booleans(), st.lists, max_leaves=4), min_size=1))
@settings(max_examples=60, deadline=None)
def test_any_array_is_read_in_pieces_as_it_is_in_whole(
    rows: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("array") / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=True), encoding="utf-8")
    for chunk in (1, 3, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_rows, "_CHUNK", chunk)
            assert values(path) == rows


def test_characters_cut_between_chunks_stay_whole(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", 1)
    file.write_text(json.dumps(["é猫😀"], ensure_ascii=False), encoding="utf-8")
    assert values(file) == ["é猫😀"]


def test_numbers_are_the_rows_of_an_array_and_the_lines_of_a_file_of_lines(file: Path) -> None:
    file.write_text("[1,\n\n2]")
    assert [row.number for row in read_rows(file)] == [1, 2]
    file.write_text("1\n\n2\n")
    assert [row.number for row in read_rows(file)] == [1, 3]


def test_a_broken_line_is_told_and_the_next_is_read(file: Path) -> None:
    file.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    rows = list(read_rows(file))
    assert [row.problem is None for row in rows] == [True, False, True]
    assert rows[2].value == {"a": 3}


def test_bytes_that_are_not_utf_8_arrive_as_surrogates(file: Path) -> None:
    for template in (b'["caf%s"]', b'"caf%s"\n'):
        file.write_bytes(template % b"\xe9")
        assert values(file) == ["caf\udce9"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        ('["a"]'.encode("utf-16"), "UTF-16"),
        (b'["a", "b"', "row 2: a comma"),
        (b'["a" "b"]', "row 1: a comma"),
        (b'["a", {"b": }]', "row 2: is not JSON"),
        (b'["a", {"b": "c', "row 2: is not JSON"),
        (b'["a",]', "row 2: is not JSON"),
        (b'["a"]["b"]', "something follows"),
        (b"[]\n[]", "something follows"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_place(file: Path, text: bytes, named: str) -> None:
    file.write_bytes(text)
    with pytest.raises(DataError, match=named) as caught:
        list(read_rows(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b'["a"]', b'"a"'])
def test_blank_space_may_lead_however_long(file: Path, text: bytes) -> None:
    file.write_bytes(b"\n" * 10_000 + text + b"\n\n")
    assert [row.value for row in read_rows(file)] == ["a"]


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(tmp_path / "none.json"))


def test_a_row_without_end_does_not_pull_the_file_into_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "ROW_LIMIT", 1000)
    monkeypatch.setattr(json_rows, "_CHUNK", 100)
    file.write_text('["' + "x" * 100_000 + '"]')
    with pytest.raises(DataError, match="row 1"):
        list(read_rows(file))
    file.write_text('"' + "x" * 100_000 + '"\n"next"')
    assert [row.value for row in read_rows(file)] == [None, "next"]
