"""The bodies of OpenAI's embeddings API, which here take images beside texts.

In: the bytes of a request body, and vectors. Out: an `EmbeddingCall`, or an error that names the field; a reply. An
image is a string that is a data URI or a file's id, or the part of a chat's message that would show it. Does not know
HTTP or Ray.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, field_validator

from mmllm_core.errors import BadInput
from serve_apps.embeddings import Embeddings, TypedText
from serve_apps.limits import Limits
from serve_apps.media import Elsewhere, FileUse, ImageSource, LinkedImage
from serve_apps.openai_body import Body, json_object, validated
from serve_apps.openai_protocol import FileContent, ImageContent, TextContent
from serve_apps.stored_file import is_file_id

Given = Annotated[TextContent | ImageContent | FileContent, Field(discriminator="type")]


class EmbeddingRequest(Body):
    """The fields of a request that are understood."""

    model: str
    input: Annotated[list[Given], FailFast()] = Field(min_length=1)
    """A text or an image, or a list of them."""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, gt=0)
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _strings_are_parts(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("this field is required")
        return [_part(one) for one in value] if isinstance(value, list) else [_part(value)]


@dataclass(frozen=True)
class EmbeddingCall:
    """A request as CLIP takes it."""

    model: str
    inputs: tuple[ImageSource | TypedText, ...]
    in_base64: bool
    dimensions: int | None

    def reply(self, found: Embeddings) -> dict[str, Any]:
        """The body of the answer."""
        rows = [
            base64.b64encode(vector.astype("<f4").tobytes()).decode() if self.in_base64 else vector.tolist()
            for vector in found.vectors
        ]
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
            "model": self.model,
            "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
        }


def parse_embedding_request(body: bytes, limits: Limits, elsewhere: Elsewhere) -> EmbeddingCall:
    """Read and check a request body.

    Raises:
        BadInput: as `openai_protocol.parse_request`.
    """
    request = validated(EmbeddingRequest, json_object(body, limits))
    if (found := len(request.input)) > limits.max_embeddings:
        raise BadInput(f"'input': {found} entries, and at most {limits.max_embeddings} are taken at a time", "input")
    if sum(len(part.text) for part in request.input if isinstance(part, TextContent)) > limits.max_text_chars:
        raise BadInput(f"'input': more than the {limits.max_text_chars} characters that are allowed", "input")
    inputs = tuple(_source(part, f"input.{i}", elsewhere) for i, part in enumerate(request.input))
    _require_bounded(inputs, limits)
    return EmbeddingCall(request.model, inputs, request.encoding_format == "base64", request.dimensions)


def _require_bounded(inputs: Sequence[ImageSource | TypedText], limits: Limits) -> None:
    """What a request names is held in memory as what it brings along is, and is bounded alike."""
    if sum(one.file.record.bytes for one in inputs if isinstance(one, FileUse)) > limits.max_body_bytes:
        raise BadInput(
            f"'input': its files are larger together than the {limits.max_body_bytes} bytes that are allowed at a time",
            "input",
        )
    if (found := sum(isinstance(one, LinkedImage) for one in inputs)) > limits.max_images:
        raise BadInput(f"'input': {found} URLs, and at most {limits.max_images} are fetched at a time", "input")


def _part(value: Any) -> Any:
    if isinstance(value, int | float | list):
        raise ValueError("expected texts or images; token ids are not taken")
    if not isinstance(value, str):
        return value
    if value.startswith("data:image/") or is_file_id(value):
        return {"type": "image_url", "image_url": {"url": value}}
    return {"type": "text", "text": value}


def _source(
    part: TextContent | ImageContent | FileContent, param: str, elsewhere: Elsewhere
) -> ImageSource | TypedText:
    if isinstance(part, TextContent):
        return TypedText(part.text, param)
    if isinstance(part, ImageContent):
        return elsewhere.image(part.image_url.url, param)
    return elsewhere.image_file(part.file.file_id, param)
