"""Whisper on real and spoken clips, by both engines on the same weights."""

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio
import numpy as np
import pytest
from numpy.typing import NDArray

from mmllm_core.audio import SAMPLE_RATE, SpeechTask, Transcriber, decode_audio
from mmllm_core.audio import engine as engines
from mmllm_core.audio.engine import Decoded
from mmllm_core.audio.languages import ENGLISH
from mmllm_core.audio.sentences import sentences
from mmllm_core.audio.transcript import Word
from mmllm_core.audio.windows import Window
from mmllm_core.errors import BadInput, WeightsError
from mmllm_core.evaluation.wer import word_error_rate
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from tests.spoken_sentences import SENTENCES, joined_recordings, recordings

SPEECH = Path(gradio.__file__).parent / "media_assets" / "audio" / "heath_ledger.mp3"
Waveform = NDArray[np.float32]


def build(**changes: Any) -> Transcriber:
    audio = load_profile("embedded").audio
    return Transcriber(audio.model_validate(audio.model_dump() | changes), resolve(audio.source), threads=1)


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    return build()


@pytest.fixture(scope="module")
def exact() -> Transcriber:
    """faster-whisper as near to openai-whisper as it comes."""
    return build(compute_type="float32", tail_seconds=None, batch_size=3)


@pytest.fixture(scope="module")
def reference() -> Transcriber:
    if importlib.util.find_spec("whisper") is None:
        pytest.skip("openai-whisper is not installed: pip install 'mmllm[openai-whisper]'")
    return build(engine="openai-whisper", compute_type="float32", batch_size=3)


@pytest.fixture(scope="module")
def speech() -> Waveform:
    return decode_audio(SPEECH.read_bytes(), 60)


def test_real_speech_is_heard(transcriber: Transcriber, speech: Waveform) -> None:
    transcript = transcriber.transcribe(speech)
    assert "never do it for free" in transcript.text
    assert transcript.language == "en"
    assert 0 <= transcript.segments[0].start < transcript.segments[-1].end <= transcript.seconds


def no_speech(seconds: float) -> dict[str, NDArray[np.float64]]:
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(0).standard_normal(time.size)
    clicks = np.zeros(time.size)
    clicks[:: SAMPLE_RATE // 2] = 1
    return {
        "silence": np.zeros(time.size),
        "faint noise": 0.003 * noise,
        "noise": 0.1 * noise,
        "loud noise": np.clip(0.5 * noise, -1, 1),
        "a tone": 0.5 * np.sin(2 * np.pi * 440 * time),
        "hum": 0.3 * np.sign(np.sin(2 * np.pi * 50 * time)),
        "clicks": clicks,
    }


@pytest.mark.parametrize("kind", no_speech(0.1))
def test_nothing_is_made_up_where_nobody_speaks(transcriber: Transcriber, kind: str) -> None:
    transcript = transcriber.transcribe(no_speech(40)[kind].astype(np.float32))
    assert (transcript.text, transcript.segments) == ("", ())


@pytest.mark.lengthy
def test_a_long_clip_has_every_word_of_its_parts_once(transcriber: Transcriber) -> None:
    clip = joined_recordings()
    assert clip.size > 60 * SAMPLE_RATE
    parts = [transcriber.transcribe(recording).text for recording in recordings()]
    whole = transcriber.transcribe(clip)
    assert len(whole.segments) > 1
    found = word_error_rate([" ".join(parts)], [whole.text])
    assert found.rate < 0.05
    assert word_error_rate([" ".join(SENTENCES)], [whole.text]).rate < 0.1
    assert abs(found.deletions - found.insertions) <= 3  # words heard otherwise, none lost or doubled


def test_times_are_those_of_the_clip(transcriber: Transcriber, speech: Waveform) -> None:
    before, between = (np.zeros(int(s * SAMPLE_RATE), dtype=np.float32) for s in (7, 50))
    clip = np.concatenate([before, speech, between, speech])
    transcript = transcriber.transcribe(clip, SpeechTask(timed=True))
    words = [word for segment in transcript.segments for word in segment.words]
    seconds = speech.size / SAMPLE_RATE
    free = [word for word in words if "free" in word.text]
    assert [word.end for word in free] == pytest.approx([7 + seconds, 57 + 2 * seconds], abs=0.8)
    assert all(a.end <= b.start for a, b in pairwise(words))
    assert not [word for word in words if 7 + seconds + 0.5 < word.start < 57 + seconds - 0.5]


@pytest.mark.slow
def test_both_engines_hear_the_same(exact: Transcriber, reference: Transcriber, speech: Waveform) -> None:
    for clip in (speech, *recordings()[:3], np.concatenate(recordings()[:6])):
        assert reference.transcribe(clip).text == exact.transcribe(clip).text
    tasks = SpeechTask(timed=True)
    ours, theirs = (
        [word for segment in engine.transcribe(speech, tasks).segments for word in segment.words]
        for engine in (exact, reference)
    )
    assert [word.text for word in ours] == [word.text for word in theirs]
    assert [word.end for word in ours] == pytest.approx([word.end for word in theirs], abs=0.1)


@pytest.mark.lengthy
def test_windows_decoded_together_are_heard_as_alone(exact: Transcriber) -> None:
    alone = build(compute_type="float32", tail_seconds=None)
    clip = joined_recordings()
    assert exact.transcribe(clip).text == alone.transcribe(clip).text


def test_a_prompt_gives_the_spelling(transcriber: Transcriber, speech: Waveform) -> None:
    shouted = transcriber.transcribe(speech, SpeechTask(prompt="NEVER DO IT FOR FREE! IF YOU'RE GOOD AT SOMETHING!"))
    assert shouted.text.isupper()
    assert word_error_rate([transcriber.transcribe(speech).text], [shouted.text]).errors == 0
    assert transcriber.transcribe(speech, SpeechTask(prompt="x " * 5000)).language == "en"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transcriber", "exact", "reference"])
def test_nothing_is_lost_where_more_is_said_than_may_be_written(
    engine: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject: Transcriber = request.getfixturevalue(engine)
    clip = np.concatenate(recordings()[:5])
    whole = subject.transcribe(clip)
    assert any(len(segment.tokens) > 24 for segment in whole.segments)
    monkeypatch.setattr(engines, "MAX_TOKENS", 12)
    cut = subject.transcribe(clip, SpeechTask(timed=True))
    found = word_error_rate([whole.text], [cut.text])
    assert found.rate < 0.15
    assert abs(found.deletions - found.insertions) <= 3  # words heard otherwise, none lost or doubled
    words = [word for segment in cut.segments for word in segment.words]
    assert all(a.end <= b.start for a, b in pairwise(words))
    assert words[-1].end == pytest.approx(clip.size / SAMPLE_RATE, abs=1)


@pytest.mark.parametrize("engine", ["transcriber", "reference"])
@pytest.mark.parametrize("prompt", ["", "x " * 5000], ids=["no prompt", "a long prompt"])
@pytest.mark.lengthy
def test_what_is_stopped_says_so(
    engine: str, prompt: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = request.getfixturevalue(engine)._engine
    task = SpeechTask(prompt=prompt)
    monkeypatch.setattr(engines, "MAX_TOKENS", 12)
    [stopped] = subject.decode([recordings()[0]], task, "en", 0.0, True)
    assert (len(stopped.tokens), stopped.is_whole) == (12, False)


@pytest.mark.lengthy
def test_what_a_long_prompt_stops_says_so(transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = transcriber._engine
    monkeypatch.setattr(engine._model, "max_length", 24)
    [stopped] = engine.decode([recordings()[0]], SpeechTask(prompt="x " * 5000), "en", 0.0, True)
    assert (len(stopped.tokens), stopped.is_whole) == (11, False)


def test_a_transcription_can_be_left_at_any_window(transcriber: Transcriber) -> None:
    begun = transcriber.begin(joined_recordings())
    assert begun.next_segments()
    assert begun.language == "en"


@pytest.mark.parametrize(("task", "param"), [(SpeechTask("xx"), "language"), (SpeechTask("de"), "language")])
def test_a_language_that_is_not_known_is_refused(transcriber: Transcriber, task: SpeechTask, param: str) -> None:
    with pytest.raises(BadInput) as caught:
        transcriber.begin(np.zeros(SAMPLE_RATE, dtype=np.float32), task)
    assert caught.value.param == param


def test_a_folder_without_whisper_is_one_named_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="CTranslate2"):
        Transcriber(load_profile("embedded").audio, tmp_path)


def test_openai_whisper_does_not_compute_in_int8() -> None:
    with pytest.raises(ValueError, match="openai-whisper computes in float32"):
        build(engine="openai-whisper")


class Failing:
    """An engine whose tries fail as they are told to."""

    languages = ENGLISH

    def __init__(self, *tries: Decoded):
        self._tries = list(tries)
        self.asked: list[tuple[float, bool]] = []

    def decode(
        self, windows: Sequence[Waveform], task: SpeechTask, language: str, temperature: float, in_full: bool
    ) -> list[Decoded]:
        assert len(windows) == 1
        self.asked.append((temperature, in_full))
        return [self._tries.pop(0)]


def decoded(
    text: str, avg_logprob: float = -0.2, no_speech: float = 0.0, is_whole: bool = True, tokens: tuple[int, ...] = ()
) -> Decoded:
    return Decoded(text, tokens, avg_logprob, no_speech, 0.0, is_whole)


@pytest.mark.parametrize(
    ("tries", "heard", "asked"),
    [
        ([decoded(" Hi")], "Hi", [(0.0, False)]),
        ([decoded(" free" * 40), decoded(" for free")], "for free", [(0.0, False), (0.0, True)]),
        ([decoded(" Hi. Hi.", tokens=(1, 2, 3, 1, 2, 3)), decoded(" Hi")], "Hi", [(0.0, False), (0.0, True)]),
        ([decoded(" cut", is_whole=False), decoded(" whole")], "whole", [(0.0, False), (0.0, True)]),
        ([decoded(" Thank you.", -1.5, no_speech=0.9)], "", [(0.0, False)]),
        (
            [decoded(" a", -1.5), decoded(" b", -1.2), decoded(" so" * 40), *[decoded(" c", -3)] * 4],
            "b",
            [(0.0, False), (0.0, True), (0.2, True), (0.4, True), (0.6, True), (0.8, True), (1.0, True)],
        ),
    ],
    ids=["at once", "repeats itself", "says it twice", "does not end", "silence", "the best of what fails"],
)
def test_what_fails_is_tried_again(
    transcriber: Transcriber,
    speech: Waveform,
    monkeypatch: pytest.MonkeyPatch,
    tries: list[Decoded],
    heard: str,
    asked: list[tuple[float, bool]],
) -> None:
    engine = Failing(*tries)
    monkeypatch.setattr(transcriber, "_engine", engine)
    assert transcriber.transcribe(speech).text == heard
    assert engine.asked == asked


def test_sentences_end_where_they_end_pause_or_get_long() -> None:
    window = Window(np.zeros(30 * SAMPLE_RATE, dtype=np.float32), ((0, 30 * SAMPLE_RATE),))
    said = " Mr. Smith paid 3.5 pounds today. He left. Then he came back and so on"
    words = [Word(i, i + 0.8, f" {word}") for i, word in enumerate(said.split())]
    words = [*words[:-1], Word(25.0, 25.5, words[-1].text)]
    found = list(sentences(window, Decoded(said, (), -0.1, 0.0, 0.0, True, tuple(words))))
    assert [segment.text.strip() for segment in found] == [
        "Mr. Smith paid 3.5 pounds today.",
        "He left.",
        "Then he came back and so",
        "on",
    ]
    assert "".join(segment.text for segment in found) == said
