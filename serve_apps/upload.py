"""Bytes that a caller sent, and the request field they came in, so that an error can name it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Upload:
    """An image or a sound as it was sent.

    Args:
        data: the file's bytes, neither decoded nor checked.
        param: where they stood in the request, e.g. `messages.0.content.1.image_url`.
    """

    data: bytes
    param: str
