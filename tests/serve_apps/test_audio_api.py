"""Transcriptions and translations over HTTP, with the client that callers use."""

import io
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from mmllm_core.bundle import Bundle
from mmllm_core.evaluation.speech_synthesis import EspeakSpeaker, EspeakVoice
from mmllm_core.evaluation.wer import word_error_rate
from tests.serve_apps.conftest import ServeHere, Service, build_tiny_bundle, image_uri, wav
from tests.spoken_sentences import SENTENCES, joined_recordings
from tests.whisper_weights import whisper_base

pytestmark = pytest.mark.slow

SAID = "never do it for free"
URL = "/v1/audio/transcriptions"


@pytest.fixture(scope="module")
def service(bundle: Bundle, serve_here: ServeHere) -> Service:
    return serve_here(bundle, {"limits.max_body_bytes": 2_000_000})


def post(service: Service, url: str = URL, file: Any = None, **fields: Any) -> httpx.Response:
    data = {"model": service.model} | fields
    files = {"file": ("clip.mp3", file)} if file is not None else None
    return httpx.post(service.base_url + url, data=data, files=files, timeout=60)


def test_a_file_is_written_down(service: Service, speech: bytes) -> None:
    reply = service.client().audio.transcriptions.create(model="tiny", file=("a.mp3", speech))
    assert SAID in reply.text
    assert reply.usage is not None
    assert reply.usage.type == "duration"
    assert reply.usage.seconds == pytest.approx(3, abs=0.3)


def test_openais_name_of_whisper_is_understood_and_others_are_not(service: Service, speech: bytes) -> None:
    assert SAID in service.client().audio.transcriptions.create(model="whisper-1", file=("a.mp3", speech)).text
    with pytest.raises(openai.NotFoundError) as caught:
        service.client().audio.transcriptions.create(model="gpt-4o-transcribe", file=("a.mp3", speech))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_verbose_transcription_has_times_of_segments_and_words(service: Service, speech: bytes) -> None:
    create = service.client().audio.transcriptions.create
    plain = create(model="tiny", file=("a.mp3", speech), response_format="verbose_json")
    assert (plain.language, plain.words) == ("english", None)
    assert plain.duration == pytest.approx(3, abs=0.3)
    assert plain.segments
    assert "".join(segment.text for segment in plain.segments) == plain.text
    assert 0 <= plain.segments[0].start < plain.segments[-1].end <= plain.duration
    assert plain.segments[0].avg_logprob < 0
    both = create(
        model="tiny",
        file=("a.mp3", speech),
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        language="en",
        temperature=0,
        prompt="Advice.",
    )
    assert both.segments
    assert both.words
    assert " ".join(word.word for word in both.words) == both.text
    times = [time for word in both.words for time in (word.start, word.end)]
    assert times == sorted(times)
    alone = create(
        model="tiny", file=("a.mp3", speech), response_format="verbose_json", timestamp_granularities=["word"]
    )
    assert alone.segments is None
    assert alone.words


def test_text_and_subtitles(service: Service, speech: bytes) -> None:
    create = service.client().audio.transcriptions.create
    assert SAID in create(model="tiny", file=("a.mp3", speech), response_format="text")
    times = r"00:00:0\d{1}[.,]\d{3} --> 00:00:0\d[.,]\d{3}"
    srt = create(model="tiny", file=("a.mp3", speech), response_format="srt")
    assert re.match(rf"1\n{times}\n[^\n]*\n\n", srt)
    assert "," in srt.splitlines()[1]
    vtt = create(model="tiny", file=("a.mp3", speech), response_format="vtt")
    assert re.match(rf"WEBVTT\n\n{times}\n[^\n]*\n\n", vtt)
    assert post(service, file=speech, response_format="vtt").headers["content-type"].startswith("text/vtt")


@pytest.mark.parametrize("kind", ["json", "text", "srt", "verbose_json", "vtt"])
def test_silence_is_empty_in_every_format(service: Service, kind: str) -> None:
    reply = post(service, file=wav(np.zeros(32_000)), response_format=kind)
    assert reply.status_code == 200
    if "json" in kind:
        assert reply.json()["text"] == ""
        assert reply.json().get("segments", []) == []
    else:
        assert reply.text.strip() in ("", "WEBVTT")


@pytest.fixture(scope="module")
def long_clip() -> bytes:
    """Sixteen sentences, more than one window of them, in less than the service's bytes."""
    return wav(joined_recordings((0.3,)))


def test_a_stream_tells_segments_as_they_are_heard(service: Service, long_clip: bytes) -> None:
    clip = long_clip
    whole = service.client().audio.transcriptions.create(model="tiny", file=("a.wav", clip))
    assert word_error_rate([" ".join(SENTENCES)], [whole.text]).rate < 0.1
    events = list(service.client().audio.transcriptions.create(model="tiny", file=("a.wav", clip), stream=True))
    assert [event.type for event in events] == ["transcript.text.delta"] * (len(events) - 1) + ["transcript.text.done"]
    assert len(events) > 2
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == whole.text


def test_a_verbose_stream_has_times(service: Service, speech: bytes) -> None:
    create = service.client().audio.transcriptions.create
    *deltas, done = list(create(model="tiny", file=("a.mp3", speech), stream=True, response_format="verbose_json"))
    assert deltas[0].segment["text"] == deltas[0].delta
    assert deltas[0].segment["end"] > deltas[0].segment["start"]
    assert done.language == "english"


def test_who_leaves_a_stream_keeps_nobody_waiting(service: Service, speech: bytes, long_clip: bytes) -> None:
    for _ in range(3):
        files = {"file": ("a.wav", long_clip)}
        data = {"model": "tiny", "stream": "true"}
        with httpx.stream("POST", service.base_url + URL, data=data, files=files, timeout=60) as reply:
            assert "transcript.text.delta" in next(reply.iter_lines())
    assert post(service, file=speech).status_code == 200


@pytest.fixture(scope="module")
def multilingual_service(service: Service, serve_here: ServeHere, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A service that hears other languages than English, and nothing longer than 20 seconds."""
    bundle = build_tiny_bundle(tmp_path_factory.mktemp("home"), whisper_base())
    return serve_here(bundle, {"limits.max_transcription_seconds": 20, "limits.max_body_bytes": 2_000_000})


@pytest.fixture(scope="module")
def german() -> Iterator[bytes]:
    """A machine that says what Whisper hears without trying again, which it does at random."""
    speaker = EspeakSpeaker()
    yield speaker.speak_as("Guten Morgen, meine Damen und Herren.", EspeakVoice("de", 120, 40))
    speaker.close()


def test_a_language_is_detected_named_and_translated(multilingual_service: Service, german: bytes) -> None:
    audio = multilingual_service.client().audio
    heard = audio.transcriptions.create(model="tiny", file=("a.wav", german), response_format="verbose_json")
    assert heard.language == "german"
    assert "Guten Morgen" in heard.text
    english = audio.translations.create(model="tiny", file=("a.wav", german))
    assert "good morning" in english.text.lower()
    verbose = audio.translations.create(model="tiny", file=("a.wav", german), response_format="verbose_json")
    assert verbose.language == "english"
    named = audio.transcriptions.create(model="tiny", file=("a.wav", german), language="de")
    assert "Guten Morgen" in named.text


def test_what_is_longer_than_allowed_is_refused(multilingual_service: Service) -> None:
    reply = post(multilingual_service, file=wav(np.zeros(21 * 16_000)))
    assert "longer than 20 seconds" in refused(reply, 400, "file")["message"]


def refused(reply: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "Traceback" not in reply.text
    return error


def riff(rate: int, channels: int = 1, data: bytes = bytes(4000)) -> bytes:
    """A wav file that claims what it is told to."""
    layout = struct.pack("<IHHIIHH", 16, 1, channels, rate, (rate * 2 * channels) % 2**32, 2 * channels % 2**16, 16)
    body = b"WAVEfmt " + layout + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def video_only() -> bytes:
    """An mp4 file with a picture and no sound."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width = video.height = 32
        for _ in range(3):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8), "rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
BAD_FILES: dict[str, bytes] = {
    "nothing": b"",
    "text": b"Hello, this is no sound.",
    "zeros": bytes(5000),
    "a picture": image_uri().encode(),
    "a cut header": riff(16_000)[:30],
    "no samples": riff(16_000, data=b""),
    "a rate of nothing": riff(0),
    "one sample a second": riff(1, data=bytes(200_000)),
    "a rate beyond all": riff(2**31 - 1),
    "no channels": riff(16_000, channels=0),
    "channels beyond all": riff(16_000, channels=65_535, data=bytes(200_000)),
    "a picture that moves": video_only(),
    "a playlist": PLAYLIST,
    "another playlist": b"ffconcat version 1.0\nfile /etc/passwd\n",
}
BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "a temperature that is not a number": ({"temperature": "NaN"}, "temperature"),
    "a temperature without end": ({"temperature": "inf"}, "temperature"),
    "a temperature that is a word": ({"temperature": "hot"}, "temperature"),
    "a temperature above": ({"temperature": "1.5"}, "temperature"),
    "a temperature below": ({"temperature": "-0.1"}, "temperature"),
    "an unknown format": ({"response_format": "yaml"}, "response_format"),
    "speakers told apart": ({"response_format": "diarized_json"}, "response_format"),
    "an unknown language": ({"language": "xx"}, "language"),
    "a language without end": ({"language": "e" * 5000}, "language"),
    "another language than the weights know": ({"language": "de"}, "language"),
    "a stream that is a word": ({"stream": "perhaps"}, "stream"),
    "a stream of subtitles": ({"stream": "true", "response_format": "srt"}, "response_format"),
    "times of what has none": ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
    "times of letters": (
        {"timestamp_granularities[]": "letter", "response_format": "verbose_json"},
        "timestamp_granularities.0",
    ),
    "a prompt that takes over": ({"prompt": "<|startoftranscript|><|de|>"}, "prompt"),
    "probabilities": ({"include[]": "logprobs"}, "include"),
    "speakers": ({"known_speaker_names[]": "A"}, "known_speaker_names"),
    "chunks of another kind": ({"chunking_strategy": "by_hand"}, "chunking_strategy"),
    "an unknown field": ({"tempurature": "1"}, "tempurature"),
    "a model that is empty": ({"model": ""}, "model"),
    "two models": ({"model": ["tiny", "tiny"]}, "model"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_cannot_be_used_are_refused_by_name(service: Service, case: str) -> None:
    error = refused(post(service, file=BAD_FILES[case]), 400, "file")
    assert error["code"] == "invalid_audio"
    assert not re.search(r"av\.|ffmpeg|errno|/etc", error["message"], re.IGNORECASE)


def test_a_stream_that_cannot_begin_is_refused_before_it_does(service: Service) -> None:
    refused(post(service, file=b"no sound", stream="true"), 400, "file")


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_fields_that_cannot_be_used_are_refused_by_name(service: Service, speech: bytes, case: str) -> None:
    fields, param = BAD_FIELDS[case]
    assert refused(post(service, file=speech, **fields), 400, param)["message"]


def test_english_weights_do_not_translate(service: Service, speech: bytes) -> None:
    refused(post(service, "/v1/audio/translations", file=speech), 400, "model")


def test_fields_of_a_transcription_are_none_of_a_translation(service: Service, speech: bytes) -> None:
    refused(post(service, "/v1/audio/translations", file=speech, language="en"), 400, "language")


def test_forms_that_cannot_be_read_are_refused(service: Service, speech: bytes) -> None:
    url = service.base_url + URL
    refused(httpx.post(url, json={"model": "tiny"}), 400, None)
    refused(httpx.post(url, content=b"x", headers={"content-type": "multipart/form-data"}), 400, None)
    cut = b'--a\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
    with_boundary = {"content-type": "multipart/form-data; boundary=a"}
    assert httpx.post(url, content=cut, headers=with_boundary).status_code == 400
    assert httpx.post(url, content=b"\0" * 100, headers=with_boundary).status_code == 400
    refused(httpx.post(url, files={"model": (None, "tiny")}), 400, "file")
    refused(httpx.post(url, files={"model": (None, "tiny"), "file": (None, "abc")}), 400, "file")
    many = {f"field{i}": "1" for i in range(2000)}
    refused(post(service, file=speech, **many), 400, None)
    refused(post(service, file=speech, prompt="x" * 100_000), 400, None)
    two = [("file", ("a.mp3", speech)), ("file", ("b.mp3", speech))]
    refused(httpx.post(url, data={"model": "tiny"}, files=two), 400, None)
    assert post(service, file=bytes(2_500_000)).status_code == 413


def test_the_description_says_what_forms_hold(service: Service) -> None:
    described = httpx.get(f"{service.base_url}/openapi.json").json()["paths"]
    for path, fields in (
        (URL, {"file", "model", "language", "stream", "timestamp_granularities[]", "temperature"}),
        ("/v1/audio/translations", {"file", "model", "prompt", "temperature"}),
    ):
        schema = described[path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert fields <= set(schema["properties"])
        assert schema["required"] == ["file", "model"]
        assert json.dumps(schema).count("$ref") == 0


def test_seconds_of_sound_count_as_work_while_they_are_heard(speech: bytes, long_clip: bytes, tmp_path: Path) -> None:
    """Without HTTP: what the autoscaler is told, and that nobody's clip is heard any further when he has left."""
    import asyncio

    from mmllm_core.audio import SpeechTask
    from serve_apps.config_files import load_serve_config
    from serve_apps.speech import SpeechCall
    from serve_apps.upload import Upload
    from serve_apps.whisper_app import WhisperDeployment

    bundle = build_tiny_bundle(tmp_path)
    whisper = WhisperDeployment(bundle.folder, load_serve_config("embedded").whisper)
    engine = whisper._transcriber._engine
    decoded: list[float] = []
    decode = engine.decode

    def counted(windows: Any, *arguments: Any) -> Any:
        decoded.extend(window.size for window in windows)
        return decode(windows, *arguments)

    engine.decode = counted  # type: ignore[method-assign]
    clip = Upload(long_clip, "file")

    async def leave() -> None:
        pieces = whisper.listen(SpeechCall(clip, SpeechTask(), 1800))
        assert not (await anext(pieces)).segments
        assert whisper.record_autoscaling_stats()["work"] == pytest.approx(len(long_clip) / 32_000, abs=0.1)
        assert (await anext(pieces)).segments
        await pieces.aclose()
        assert whisper.record_autoscaling_stats()["work"] == 0
        n = len(decoded)
        assert SAID in (await whisper.transcribe(Upload(speech, "a"))).text
        assert len(decoded) == n + 1  # the queue held nothing of the clip that was left

    asyncio.run(leave())
