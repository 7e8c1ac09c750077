"""What one request may take, of bytes, time, text and media. Does not know where requests come from."""

from pydantic import Field

from mmllm_core.config import StrictModel


class Limits(StrictModel):
    """What one request may take, and what it gets when it does not say."""

    max_body_bytes: int = Field(default=25_000_000, gt=0)
    max_header_bytes: int = Field(default=16_384, gt=0)
    """Of all headers and the URL together."""
    body_timeout_s: float = Field(default=60.0, gt=0)
    """Within which a request's body has to arrive."""
    request_timeout_s: float = Field(default=300.0, gt=0)
    max_images: int = Field(default=8, ge=0)
    max_audio_clips: int = Field(default=4, ge=0)
    max_transcription_seconds: float = Field(default=1800.0, gt=0)
    """Of a clip that is sent to be transcribed; in a chat the profile's `audio.max_seconds` holds."""
    max_messages: int = Field(default=1_000, gt=0)
    max_text_chars: int = Field(default=200_000, gt=0)
    """Typed text of a whole conversation; the model's context is checked later, token by token."""
    max_answers: int = Field(default=8, gt=0)
    """That one request may ask for (`n`)."""
    max_embeddings: int = Field(default=128, gt=0)
    """Texts and images that one request may ask vectors of."""
    max_schema_chars: int = Field(default=50_000, gt=0)
    """Of a JSON schema that answers shall keep to."""
    default_max_tokens: int = Field(default=256, gt=0)
    default_temperature: float = Field(default=0.0, ge=0, le=2)

    @property
    def max_json_values(self) -> int:
        """Values that a request's JSON may hold, counted before it is read: a body of millions of empty lists takes a
        hundred times its size in memory. Text and schemas may be all commas, which count as values too."""
        return 10_000 + 10 * self.max_messages + self.max_text_chars + self.max_schema_chars
