"""Speech is the same for the same text and key, whatever was said before, and Whisper understands it."""

import io
import wave
from collections.abc import Callable, Iterator

import pytest

from mmllm_core.audio import Transcriber, decode_audio
from mmllm_core.errors import EnvironmentLack, MmllmError
from mmllm_core.evaluation.speech_synthesis import (
    ESPEAK_VOICES,
    PIPER_VOICE,
    EspeakSpeaker,
    EspeakVoice,
    Speaker,
    SpeakerName,
    build_speaker,
    can_speak,
    require_speaker,
)
from mmllm_core.evaluation.wer import heard_rightly, normalise_english, word_error_rate
from mmllm_core.models.packages import fetch_package
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve

TEXTS = ("what color is the shape?", "is there a red circle in the image?", "no")

MakeSpeaker = Callable[[SpeakerName], Speaker]


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    audio = load_profile("embedded").audio
    normalise_english("")  # as the voice: fetched into the usual home, which a test does not see
    return Transcriber(audio, resolve(audio.source), threads=1)


@pytest.fixture(scope="module")
def _voice() -> None:
    fetch_package(PIPER_VOICE)


@pytest.fixture
def make_speaker(_voice: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeSpeaker]:
    """Build speakers with the usual home's voice; they are closed at the end."""
    monkeypatch.delenv("MMLLM_HOME")
    made = []

    def build(name: SpeakerName) -> Speaker:
        if not can_speak(name):
            pytest.skip(f"{name} is not installed: pip install '.[speech-eval]'")
        made.append(build_speaker(name, seed=1))
        return made[-1]

    yield build
    for speaker in made:
        speaker.close()


@pytest.mark.parametrize("name", SpeakerName)
@pytest.mark.lengthy
def test_a_clip_depends_on_its_text_and_key_alone(name: SpeakerName, make_speaker: MakeSpeaker) -> None:
    one, other = make_speaker(name), make_speaker(name)
    clips = {(text, key): one.speak(text, key) for text in TEXTS for key in ("a", "b", "c")}
    again = {pair: other.speak(*pair) for pair in reversed(clips)}
    assert clips == again
    assert len(set(clips.values())) == len(clips), "a key decides how a text is said"


@pytest.mark.parametrize("name", SpeakerName)
def test_a_clip_is_a_wav_file_of_speech(name: SpeakerName, make_speaker: MakeSpeaker) -> None:
    speaker = make_speaker(name)
    with wave.open(io.BytesIO(speaker.speak("what color is the shape?", "a"))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 22_050)
        seconds = file.getnframes() / file.getframerate()
    assert 0.7 < seconds < 4
    longer = speaker.speak("what color is the shape, and is there a red circle in the image?", "a")
    assert len(longer) > 1.5 * 2 * 22_050 * seconds


def test_whisper_hears_what_piper_says(make_speaker: MakeSpeaker, transcriber: Transcriber) -> None:
    speaker = make_speaker(SpeakerName.PIPER)
    said = ["is there a red circle in the image?", "is there not a triangle in the image?", "what color is it?"]
    heard = [transcriber.transcribe(decode_audio(speaker.speak(text, "a"), 60)).text for text in said]
    assert word_error_rate(said, heard).rate < 0.1


def test_whisper_hears_what_espeak_says(make_speaker: MakeSpeaker, transcriber: Transcriber) -> None:
    speaker = make_speaker(SpeakerName.ESPEAK)
    assert isinstance(speaker, EspeakSpeaker)
    clip = speaker.speak_as("what color is the rectangle?", EspeakVoice("en-us", 150, 50))
    assert heard_rightly("what color is the rectangle?", transcriber.transcribe(decode_audio(clip, 60)).text)


def test_espeak_has_every_voice_that_is_drawn(make_speaker: MakeSpeaker) -> None:
    speaker = make_speaker(SpeakerName.ESPEAK)
    assert isinstance(speaker, EspeakSpeaker)
    clips = {speaker.speak_as("a red circle", EspeakVoice(name, 150, 50)) for name in ESPEAK_VOICES}
    assert len(clips) == len(ESPEAK_VOICES)


def test_an_unknown_voice_is_named_and_does_not_end_the_speaker(make_speaker: MakeSpeaker) -> None:
    speaker = make_speaker(SpeakerName.ESPEAK)
    assert isinstance(speaker, EspeakSpeaker)
    before = speaker.speak("a red circle", "a")
    with pytest.raises(MmllmError, match="no voice 'nobody'"):
        speaker.speak_as("a red circle", EspeakVoice("nobody", 150, 50))
    assert speaker.speak("a red circle", "a") == before


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in SpeakerName:
        with pytest.raises(EnvironmentLack, match="speech-eval"):
            require_speaker(name)
