"""A picture or a recording from this machine -> a part of a message in the API's own format.

In: a path. Out: an `Attachment`, which was read and decoded once, so that what nobody could use is told by name before
anything is sent. Does not know the service; its limits on size and length are its own to tell.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmllm_core.errors import BadInput

Kind = Literal["image", "audio"]
_SUFFIXES = ("wav", "mp3", "flac", "ogg", "opus", "webm", "m4a", "aac")
"""Formats of sound that the API has names for; what is in the file is told from its content."""
_MAX_PIXELS, _MAX_SECONDS = 200_000_000, 24 * 3600.0
"""More than any service takes, and little enough to be decoded here."""


@dataclass(frozen=True)
class Attachment:
    """A file that goes along with a question."""

    name: str
    kind: Kind
    part: dict[str, Any]
    """As it stands in a message."""

    @classmethod
    def read(cls, path: Path, kind: Kind) -> "Attachment":
        """Read a file as what it shall be.

        Raises:
            BadInput: it cannot be read, or is no such thing; the message begins with its path.
        """
        try:
            data = path.expanduser().read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
        try:
            part = _image(data) if kind == "image" else _sound(data, path.suffix[1:].lower())
        except BadInput as error:
            raise BadInput(f"{path}: {error.message}") from error
        return cls(path.name, kind, part)


def _image(data: bytes) -> dict[str, Any]:
    from PIL import Image

    from mmllm_core.vision import decode_image
    from serve_apps.media_kind import media_kind

    if media_kind(data, "image") != "image":
        raise BadInput("is a sound: send it as a recording (--audio, /audio)")
    decode_image(data, _MAX_PIXELS)
    with Image.open(io.BytesIO(data)) as image:
        kind = image.get_format_mimetype() or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _sound(data: bytes, suffix: str) -> dict[str, Any]:
    from mmllm_core.audio import decode_audio
    from serve_apps.media_kind import media_kind

    if media_kind(data, "audio") != "sound":
        raise BadInput("is an image: send it as a picture (--image, /image)")
    decode_audio(data, _MAX_SECONDS)
    sound = {"data": base64.b64encode(data).decode(), "format": suffix if suffix in _SUFFIXES else "wav"}
    return {"type": "input_audio", "input_audio": sound}
