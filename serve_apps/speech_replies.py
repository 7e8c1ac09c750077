"""The replies of OpenAI's audio API: JSON, text, subtitles, and events of a stream.

In: segments as they were heard. Out: strings and JSON-ready dictionaries. Does not know HTTP or how anything is heard.
"""

from collections.abc import Sequence

from mmllm_core.audio import Segment, Word
from mmllm_core.audio.languages import language_name
from mmllm_core.audio.transcript import joined
from serve_apps.openai_replies import Json
from serve_apps.openai_speech import SpeechRequest
from serve_apps.speech import Heard


def json_body(heard: Heard) -> Json:
    """`json`: the text, and what OpenAI bills by."""
    return {"text": joined(heard.segments), "usage": _usage(heard)}


def verbose_body(request: SpeechRequest, heard: Heard) -> Json:
    """`verbose_json`: language, length, and times of segments and words as far as they were asked for."""
    spoken = "en" if request.task.translate else heard.language
    body: Json = {
        "task": "translate" if request.task.translate else "transcribe",
        "language": None if spoken is None else language_name(spoken),
        "duration": round(heard.seconds, 2),
        "text": joined(heard.segments),
    }
    if request.with_segments:
        body["segments"] = [segment_body(i, segment) for i, segment in enumerate(heard.segments)]
    if request.with_words:
        body["words"] = [_word(word) for segment in heard.segments for word in segment.words if word.text.strip()]
    return body | {"usage": _usage(heard)}


def segment_body(number: int, segment: Segment) -> Json:
    """A segment as `verbose_json` tells it."""
    return {
        "id": number,
        "seek": round(segment.start * 100),  # frames of a hundredth of a second, as Whisper's own code says it
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": round(segment.avg_logprob, 4),
        "compression_ratio": round(segment.compression_ratio, 4),
        "no_speech_prob": round(segment.no_speech_prob, 4),
    }


def text_body(heard: Heard) -> str:
    """`text`: what was said, and the end of the line."""
    return f"{joined(heard.segments)}\n"


def srt_body(heard: Heard) -> str:
    """`srt`: SubRip subtitles."""
    return "".join(
        f"{number}\n{_clock(s.start, ',')} --> {_clock(s.end, ',')}\n{_caption(s)}\n\n"
        for number, s in enumerate(heard.segments, 1)
    )


def vtt_body(heard: Heard) -> str:
    """`vtt`: WebVTT subtitles."""
    cues = (f"{_clock(s.start, '.')} --> {_clock(s.end, '.')}\n{_caption(s)}\n\n" for s in heard.segments)
    return "WEBVTT\n\n" + "".join(cues)


def delta_event(request: SpeechRequest, number: int, segment: Segment) -> Json:
    """A segment of a stream; of `verbose_json`, `segment` (and `words`) are our extension."""
    body: Json = {"type": "transcript.text.delta", "delta": segment.text}
    if request.response_format == "verbose_json":
        if request.with_segments:
            body["segment"] = segment_body(number, segment)
        if request.with_words:
            body["words"] = [_word(word) for word in segment.words if word.text.strip()]
    return body


def done_event(request: SpeechRequest, heard: Heard) -> Json:
    """A stream's last event: all of the text, its language and length besides."""
    body = verbose_body(request, heard)
    told = ("text", "language", "duration")
    return {"type": "transcript.text.done"} | {name: body[name] for name in told}


def _usage(heard: Heard) -> Json:
    return {"type": "duration", "seconds": round(heard.seconds, 2)}


def _word(word: Word) -> Json:
    return {"word": word.text.strip(), "start": round(word.start, 2), "end": round(word.end, 2)}


def _caption(segment: Segment) -> str:
    """One line, which no reader takes for the times of another."""
    return " ".join(segment.text.split()).replace("-->", "->")


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, milliseconds = divmod(milliseconds, 3_600_000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    whole, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{point}{milliseconds:03d}"


def all_heard(pieces: Sequence[Heard]) -> Heard:
    """Pieces of one transcript, put together."""
    return Heard(pieces[-1].language, pieces[-1].seconds, tuple(s for piece in pieces for s in piece.segments))
