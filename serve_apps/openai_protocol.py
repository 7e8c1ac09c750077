"""The request bodies of OpenAI's chat completions API, as far as this assistant speaks it.

In: the bytes of a request body. Out: a `ChatCall` with messages, images and sound as the deployments take them,
or an error that names the field. Fields that cannot change an answer are ignored, unsupported ones that would are
refused. Does not know HTTP or Ray.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, field_validator

from mmllm_core.conversation import ImagePart, Message, Part, SpeechPart, TextPart
from mmllm_core.engine.protocol import SamplingParams
from mmllm_core.errors import AudioError, BadInput, ConversationError
from serve_apps.limits import Limits
from serve_apps.media import Elsewhere, FileUse, ImageSource, SoundSource, decoded
from serve_apps.openai_body import Body, json_object, validated
from serve_apps.openai_sampling import SamplingFields

IGNORED = (
    *("metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention"),
    *("safety_identifier", "service_tier", "store", "user"),
)
"""Fields of OpenAI's API that cannot change this assistant's answer."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None, "none"),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""Fields that would change the answer, with the values that ask for nothing and are let pass."""


class TextContent(Body):
    """Typed text."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """An image: `data:image/png;base64,...`, a file's id, or an https URL where these are allowed."""

    url: str
    detail: str | None = None
    """Accepted and ignored: every image is seen at the encoder's own size."""


class ImageContent(Body):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Body):
    """A sound file in base64."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg", "opus", "webm", "m4a", "aac"]


class AudioContent(Body):
    """Speech."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class FileName(Body):
    """A file that was uploaded before."""

    file_id: str
    filename: str | None = None
    """Accepted and ignored, like the name that it was uploaded with."""


class FileContent(Body):
    """An uploaded image or sound."""

    type: Literal["file"]
    file: FileName


Content = TextContent | ImageContent | AudioContent | FileContent


class ChatMessage(Body):
    """One turn; a reply's own message can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[Content, Field(discriminator="type")]], FailFast()]
    """A string, or a list of parts."""
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_is_one_part(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if not isinstance(value, list):
            raise ValueError("expected a string or a list of parts")
        return value


class StreamOptions(Body):
    """What a stream carries besides text; the usage so far in each chunk is vLLM's extension."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(SamplingFields):
    """The fields of a request that are understood."""

    model: str
    messages: Annotated[list[ChatMessage], FailFast()] = Field(min_length=1)  # FailFast: of a million errors one
    stream: bool | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True)
class ChatCall:
    """A request as the deployments take it; speech parts are empty until they are heard."""

    model: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...]
    clips: tuple[SoundSource, ...]
    sampling: SamplingParams
    stream: bool
    stream_options: StreamOptions


def parse_request(body: bytes, limits: Limits, elsewhere: Elsewhere = Elsewhere()) -> ChatCall:
    """Read and check a request body.

    Args:
        elsewhere: what the request may name instead of bringing it along.

    Raises:
        BadInput: not JSON, a field that is missing, wrong, unknown or unsupported, or too much of something;
            `param` names the field.
    """
    values = json_object(body, limits)
    if isinstance(messages := values.get("messages"), list) and len(messages) > limits.max_messages:
        raise BadInput(
            f"the request holds {len(messages)} messages and at most {limits.max_messages} are allowed", "messages"
        )
    for field, harmless in UNSUPPORTED.items():
        if values.pop(field, None) not in harmless:
            raise BadInput(f"'{field}' is not supported: leave it out", field)
    request = validated(ChatRequest, {k: v for k, v in values.items() if k not in IGNORED})
    return _to_call(request, limits, elsewhere)


def with_transcripts(call: ChatCall, transcripts: Sequence[str]) -> tuple[Message, ...]:
    """The conversation with what was heard in place of each speech part.

    Raises:
        AudioError: a message would be empty, for its only content is a clip in which nobody speaks.
    """
    heard = iter(zip(transcripts, call.clips, strict=True))
    return tuple(replace(message, parts=tuple(_heard_parts(message, heard))) for message in call.messages)


def _heard_parts(message: Message, heard: Iterator[tuple[str, SoundSource]]) -> Iterator[Part]:
    silent = not any(isinstance(p, ImagePart) or (isinstance(p, TextPart) and p.text.strip()) for p in message.parts)
    clip = None
    for part in message.parts:
        if isinstance(part, SpeechPart):
            transcript, clip = next(heard)
            silent = silent and not transcript.strip()
            part = SpeechPart(transcript)
        yield part
    if silent and clip is not None:
        raise AudioError("no speech was heard in the audio: send a clip in which somebody speaks", clip.param)


def _to_call(request: ChatRequest, limits: Limits, elsewhere: Elsewhere) -> ChatCall:
    images: list[ImageSource] = []
    clips: list[SoundSource] = []
    n_chars = 0

    def convert(part: Content, param: str) -> Part:
        nonlocal n_chars
        if isinstance(part, TextContent):
            n_chars += len(part.text)
            return TextPart(part.text)
        if isinstance(part, ImageContent):
            images.append(elsewhere.image(part.image_url.url, f"{param}.image_url"))
            return ImagePart()
        if isinstance(part, AudioContent):
            clips.append(decoded(part.input_audio.data, f"{param}.input_audio", AudioError))
            return SpeechPart("")
        use: FileUse = elsewhere.file(part.file.file_id, f"{param}.file.file_id")
        if use.file.record.kind == "image":
            images.append(use)
            return ImagePart()
        clips.append(use)
        return SpeechPart("")

    messages = []
    for i, message in enumerate(request.messages):
        for j, content in enumerate(message.content):
            if message.role != "user" and not isinstance(content, TextContent):
                raise ConversationError(
                    f"a message with role '{message.role}' holds text only: move this part to a user's message",
                    f"messages.{i}.content.{j}",
                )
        role = "system" if message.role == "developer" else message.role
        parts = tuple(convert(part, f"messages.{i}.content.{j}") for j, part in enumerate(message.content))
        messages.append(Message(role, parts))
    for found, most, what in (
        (len(images), limits.max_images, "images"),
        (len(clips), limits.max_audio_clips, "audio clips"),
        (n_chars, limits.max_text_chars, "characters of text"),
    ):
        if found > most:
            raise BadInput(f"the request holds {found} {what} and at most {most} are allowed", "messages")
    return ChatCall(
        model=request.model,
        messages=tuple(messages),
        images=tuple(images),
        clips=tuple(clips),
        sampling=request.sampling(limits),
        stream=bool(request.stream),
        stream_options=request.stream_options or StreamOptions(),
    )
