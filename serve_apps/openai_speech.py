"""The request forms of OpenAI's audio API: transcriptions, and translations into English.

In: a form. Out: a `SpeechRequest`, or an error that names the field. Fields that cannot change what is heard are
ignored, unsupported ones that would are refused. Does not know HTTP or Ray.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmllm_core.audio import SpeechTask
from mmllm_core.errors import BadInput
from serve_apps.limits import Limits
from serve_apps.multipart import Form
from serve_apps.openai_body import validated

ALIAS = "whisper-1"
"""OpenAI's name of Whisper, by which clients ask that cannot be told another."""
UNSUPPORTED = ("include", "keywords", "known_speaker_names", "known_speaker_references", "languages")
"""Lists that would change the answer."""
LISTS = ("timestamp_granularities", *UNSUPPORTED)
"""Fields that may be given several times."""
_CONTROL = re.compile(r"<\|[^<>|]*\|>")
_TIMED = ("srt", "verbose_json", "vtt")


class _Fields(BaseModel):
    """Fields of a form: each comes as a string."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TranslationFields(_Fields):
    """The fields of a translation besides its file."""

    model: str
    prompt: str | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)


class TranscriptionFields(TranslationFields):
    """The fields of a transcription besides its file."""

    language: str | None = None
    """ISO 639-1 code; detected where it is left out."""
    stream: bool = False
    timestamp_granularities: list[Literal["word", "segment"]] = Field(default_factory=list, max_length=2)
    chunking_strategy: Literal["auto"] | None = None
    """Accepted: clips are always cut where nobody speaks."""


@dataclass(frozen=True)
class SpeechRequest:
    """What was asked for."""

    model: str
    task: SpeechTask
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"]
    stream: bool
    with_words: bool
    with_segments: bool


def field_names(*, translate: bool) -> tuple[str, ...]:
    """Names of the fields that are given once, besides `file`."""
    fields = TranslationFields if translate else TranscriptionFields
    return tuple(name for name in fields.model_fields if name not in LISTS)


def parse_speech_request(form: Form, limits: Limits, *, translate: bool) -> SpeechRequest:
    """Check the fields of a form.

    Raises:
        BadInput: a field that is missing, wrong or unsupported; `param` names it.
    """
    for name in UNSUPPORTED:
        if name in form.lists:
            raise BadInput(f"'{name}' is not supported: leave it out", name)
    values: dict[str, Any] = {name: value for name, value in form.fields.items() if value != ""}
    values |= form.lists
    fields = validated(TranslationFields if translate else TranscriptionFields, values)
    given = fields if isinstance(fields, TranscriptionFields) else TranscriptionFields(model=fields.model)
    times = set(given.timestamp_granularities)
    if times and fields.response_format != "verbose_json":
        raise BadInput(
            "'timestamp_granularities': only verbose_json tells times of words and segments: ask for that",
            "timestamp_granularities",
        )
    if given.stream and fields.response_format not in ("json", "verbose_json"):
        raise BadInput("'response_format': a stream is told as json or verbose_json", "response_format")
    task = SpeechTask(
        language=given.language,
        prompt=_checked_prompt(fields.prompt or "", limits.max_text_chars),
        temperature=fields.temperature,
        translate=translate,
        timed=fields.response_format in _TIMED,
    )
    return SpeechRequest(
        model=fields.model,
        task=task,
        response_format=fields.response_format,
        stream=given.stream,
        with_words="word" in times,
        with_segments=times != {"word"},
    )


def form_schema(*, translate: bool) -> Mapping[str, Any]:
    """The form as the API's description has it."""
    fields = TranslationFields if translate else TranscriptionFields
    schema = fields.model_json_schema()
    properties = schema["properties"]
    if times := properties.pop("timestamp_granularities", None):
        properties["timestamp_granularities[]"] = {key: value for key, value in times.items() if key != "default"}
    file = {"type": "string", "format": "binary", "description": "A wav, mp3, flac, ogg, webm or m4a file."}
    return schema | {"properties": {"file": file} | properties, "required": ["file", "model"]}


def _checked_prompt(prompt: str, most: int) -> str:
    if len(prompt) > most:
        raise BadInput(f"'prompt': {len(prompt)} characters, and at most {most} are allowed", "prompt")
    if _CONTROL.search(prompt):
        raise BadInput("'prompt': it holds a control token of Whisper's, such as '<|en|>': leave it out", "prompt")
    return prompt
