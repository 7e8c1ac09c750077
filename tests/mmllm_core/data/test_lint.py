"""The linter finds each planted fault and nothing else, and says where."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmllm_core.conversation import render
from mmllm_core.data import batch_checks
from mmllm_core.data.lint import EXAMPLES, LintOptions, LintReport, lint, rendered_samples, shown_pieces
from mmllm_core.data.record import FaultKind
from mmllm_core.data.token_count import Rendering
from mmllm_core.errors import DataError
from tests.mmllm_core.data.conftest import WriteFile, chat, llava

FINE = [
    llava("one", "<image>\nWhat?", "This.", image="a.png"),
    llava("many", "Both <image> and <image>?", "Yes.", "And so?", "So.", image=["a.png", "sub/c.webp"]),
    llava("text", "What is <img>?", "A tag: naïve café, 猫, “quoted”, Ã OU Â."),
    llava("null", "Hi", "Ho") | {"image": None},
]
"""Shapes that are right; one of each fault is planted among them."""


def found(report: LintReport) -> dict[FaultKind, int]:
    return {kind: finding.count for kind, finding in report.findings.items()}


def check(path: Path, images: Path, **options: Any) -> LintReport:
    return lint(path, LintOptions(images=images, **options))


def rendering(tokenizer_folder: Path, max_length: int = 200) -> Rendering:
    return Rendering(tokenizer_folder, n_image_tokens=16, max_length=max_length)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_right_rows_are_clean(write: WriteFile, images: Path, tokenizer_folder: Path, name: str) -> None:
    report = check(write(FINE, name), images, rendering=rendering(tokenizer_folder))
    assert report.clean
    assert (report.format_name, report.rows, report.images) == ("llava", 4, 2)


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        (llava("x", "<image>", "y", image="none.png"), {FaultKind.MISSING_IMAGE}),
        (llava("x", "<image>", "y", image="page.png"), {FaultKind.BROKEN_IMAGE}),
        (llava("x", "\n ", "y"), {FaultKind.EMPTY_TURN}),
        (llava("x", "Hi", "Ho", "Hum", " "), {FaultKind.EMPTY_TURN}),
        (llava("x", "Hi", " "), {FaultKind.EMPTY_TURN, FaultKind.UNSUPERVISED}),
        (llava("x", "Hi"), {FaultKind.TURN_ORDER, FaultKind.UNSUPERVISED}),
        (llava("x", "Hi", "Ho", "Hum"), {FaultKind.TURN_ORDER}),
        ({"conversations": [{"from": "gpt", "value": "Ho"}]}, {FaultKind.TURN_ORDER}),
        (llava("x", "no placeholder", "y", image="a.png"), {FaultKind.PLACEHOLDERS}),
        (llava("x", "<image><image>", "y", image="a.png"), {FaultKind.PLACEHOLDERS}),
        (llava("x", "<image>\nWho?", "y"), {FaultKind.STRAY_PLACEHOLDER}),
        (llava("x", "Hi", "Write <image>."), set()),
        (llava("x", "caf\udce9", "y"), {FaultKind.ENCODING}),
        (llava("x", "cafÃ©", "y"), {FaultKind.GARBLED}),
        (llava("x", "caf\ufffd", "y"), {FaultKind.GARBLED}),
        (llava("x", "bell \x07", "y"), {FaultKind.GARBLED}),
        (llava("x", "It said: " + "long " * 400, "y"), {FaultKind.OVER_LONG}),
        (FINE[0] | {"id": "again"}, {FaultKind.DUPLICATE}),
        ({"conversations": 3}, {FaultKind.MALFORMED}),
        (["a list"], {FaultKind.MALFORMED}),
    ],
)
def test_a_planted_fault_is_found_and_nothing_else(
    write: WriteFile, images: Path, tokenizer_folder: Path, row: Any, kinds: set[FaultKind]
) -> None:
    (images / "page.png").write_text("<html>")
    report = check(write([*FINE, row]), images, rendering=rendering(tokenizer_folder))
    assert found(report) == dict.fromkeys(kinds, 1)
    for finding in report.findings.values():
        assert finding.examples[0].row == 5


def test_bytes_that_are_not_utf_8_are_found_in_their_row(write: WriteFile, images: Path) -> None:
    path = write(FINE)
    path.write_bytes(path.read_bytes().replace(b'"Yes."', b'"Y\xffs."'))
    report = check(path, images)
    assert found(report) == {FaultKind.ENCODING: 1}
    assert report.findings[FaultKind.ENCODING].examples[0].row == 2


def test_a_line_that_is_no_json_is_counted_and_the_rest_is_checked(write: WriteFile, images: Path) -> None:
    path = write([*FINE, llava("x", "Hi")], "rows.jsonl")
    path.write_text('{"broken": \n' + path.read_text())
    assert found(check(path, images)) == {FaultKind.NOT_JSON: 1, FaultKind.TURN_ORDER: 1, FaultKind.UNSUPERVISED: 1}


def test_windows_newlines_and_a_mark_are_no_faults(write: WriteFile, images: Path) -> None:
    path = write(FINE, "rows.jsonl")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    report = check(path, images)
    assert report.clean
    assert report.rows == 4


def test_chat_files_are_told_by_their_rows(write: WriteFile, tmp_path: Path) -> None:
    report = check(write([chat("Hi", "Ho"), chat("Hi"), {"messages": [{"role": "tool"}]}], "c.jsonl"), tmp_path)
    assert report.format_name == "chat"
    assert found(report) == {FaultKind.TURN_ORDER: 1, FaultKind.UNSUPERVISED: 1, FaultKind.MALFORMED: 1}


def test_an_array_that_breaks_off_cannot_be_linted(write: WriteFile, images: Path) -> None:
    path = write(FINE)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="row 4"):
        check(path, images)


def test_counts_are_whole_and_examples_are_the_first(write: WriteFile, images: Path) -> None:
    report = check(write([llava(str(i), f"Hi {i}") for i in range(20)]), images)
    finding = report.findings[FaultKind.TURN_ORDER]
    assert finding.count == 20
    assert [example.row for example in finding.examples] == list(range(1, EXAMPLES + 1))


@pytest.mark.lengthy
def test_worker_processes_find_what_one_process_finds(
    write: WriteFile, images: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "page.png").write_text("<html>")
    rows = [llava(str(i), f"<image> {i}", "long " * 300, image=f"none-{i}.png") for i in range(30)]
    rows[7]["image"], rows[20]["image"] = "a.png", "page.png"
    path, options = write(rows), {"rendering": rendering(tokenizer_folder), "workers": 2}
    alone = check(path, images, **options)
    monkeypatch.setattr(batch_checks, "_BATCH", 4)
    together = check(path, images, **options)
    assert found(alone) == {FaultKind.MISSING_IMAGE: 28, FaultKind.BROKEN_IMAGE: 1, FaultKind.OVER_LONG: 30}
    assert together == alone


def test_an_image_is_looked_at_once_however_often_it_is_named(write: WriteFile, images: Path) -> None:
    rows = [llava(str(i), f"<image> {i}", "y", image="none.png") for i in range(5)]
    report = check(write(rows), images)
    assert found(report) == {FaultKind.MISSING_IMAGE: 1}
    assert report.findings[FaultKind.MISSING_IMAGE].examples[0].row == 1


def test_shown_pieces_are_the_rendered_text_with_what_is_learned_marked(
    write: WriteFile, tokenizer: Any, tokenizer_folder: Path
) -> None:
    path = write([llava("1", "bad"), llava("2", "<image>\nWhat?", "This.", "And?", "That.", image="a.png")])
    ((row, id, rendered),) = rendered_samples(path, tokenizer, rendering(tokenizer_folder))
    assert (row, id) == (2, "2")
    pieces = list(shown_pieces(rendered, tokenizer))
    assert [text for text, supervised in pieces if supervised] == ["This.<|im_end|>", "That.<|im_end|>"]
    assert pieces[1] == ("<image x 16>", False)
    assert "".join(text for text, _ in pieces).count("\nWhat?<|im_end|>") == 1


def test_what_lint_calls_clean_can_be_loaded_and_rendered(
    write: WriteFile, images: Path, tokenizer: Any, tokenizer_folder: Path
) -> None:
    from mmllm_core.data.conversation_file import file_rows
    from mmllm_core.data.rows import sample_of

    path = write(FINE)
    assert check(path, images, rendering=rendering(tokenizer_folder)).clean
    for row in file_rows(path, "llava"):
        sample = sample_of(json.loads(json.dumps(row)), source="s", images=images)
        done = render(sample.messages, tokenizer, n_image_tokens=16, max_length=200, generation_prompt=False)
        assert done.n_images == len(sample.images)
        assert done.n_supervised > 0
