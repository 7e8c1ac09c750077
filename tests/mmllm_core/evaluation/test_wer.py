"""Word errors, against numbers counted by hand."""

from collections import Counter

import pytest

from mmllm_core.evaluation.wer import (
    WordErrors,
    heard_rightly,
    mishearings,
    normalise_english,
    word_error_rate,
)


@pytest.fixture(scope="module", autouse=True)
def _spellings() -> None:
    """The table of spellings is read once, from the usual home and not from a test's own."""
    normalise_english("")


def test_each_kind_of_error_is_counted() -> None:
    found = word_error_rate(["is there a red circle"], ["is their red circle now"])
    assert found == WordErrors(substitutions=1, deletions=1, insertions=1, words=5)
    assert found.errors == 3
    assert found.rate == pytest.approx(3 / 5)


def test_errors_add_up_over_texts_of_different_length() -> None:
    said = ["what color is the shape", "is it blue", "yes"]
    heard = ["what colors the shape", "is it blue", "yes it is"]
    # "color is" -> "colors": one word taken for another, one not heard; "it is" was said by nobody.
    assert word_error_rate(said, heard) == WordErrors(1, 1, 2, 9)


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("what color is the gray shape?", "What colour is the grey shape"),
        ("are there twenty one circles", "Are there 21 circles?"),
        ("it is not a circle", "It's not a circle."),
        ("a circle", "[noise] uh, a circle"),
    ],
)
def test_how_words_are_written_does_not_count(said: str, heard: str) -> None:
    assert word_error_rate([said], [heard]).errors == 0
    assert heard_rightly(said, heard)


def test_what_sounds_alike_counts() -> None:
    assert not heard_rightly("is there a teal shape", "is there a deal shape")
    assert word_error_rate(["is there a teal shape"], ["is there a deal shape"]).rate == pytest.approx(1 / 5)


def test_silence_and_words_out_of_nothing() -> None:
    assert word_error_rate(["a red circle"], [""]) == WordErrors(0, 3, 0, 3)
    assert word_error_rate([""], ["thank you"]) == WordErrors(0, 0, 2, 0)
    assert word_error_rate([""], ["thank you"]).rate == 1.0
    assert word_error_rate([], []).rate == 0.0
    assert word_error_rate(["yes"], ["yes it is red"]).rate == pytest.approx(3.0)


def test_neighbouring_errors_are_one_mishearing() -> None:
    said = ["is there a teal shape", "what is in the image", "is there a teal shape", "no"]
    heard = ["is now teal shape", "what is in damage", "is there a deal shape", "no"]
    assert mishearings(said, heard) == Counter({("there a", "now"): 1, ("the image", "damage"): 1, ("teal", "deal"): 1})
    assert mishearings([], []) == Counter()


def test_every_text_needs_what_was_heard_of_it() -> None:
    with pytest.raises(ValueError, match="2"):
        word_error_rate(["one", "two"], ["one"])
