"""Whether bytes begin as an image or a sound that can be used here, told from their first few.

Says nothing of whether the rest is whole. Does not decode.
"""

import re

from mmllm_core.errors import BadInput
from mmllm_core.vision import IMAGE_FORMATS
from serve_apps.stored_file import Kind

_IMAGE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|BM|RIFF.{4}WEBP", re.DOTALL)
_SOUND = re.compile(rb"(?:RIFF|RF64).{4}WAVE|ID3|\xff[\xe2-\xff]|fLaC|OggS|\x1aE\xdf\xa3|.{4}ftyp", re.DOTALL)
"""wav, mp3 with and without tags and raw aac, flac, ogg and opus, webm, m4a."""


class UnknownFile(BadInput):
    """A file of a kind that nobody here sees or hears."""

    code = "invalid_file"


def media_kind(data: bytes, param: str) -> Kind:
    """What a file is.

    Raises:
        UnknownFile: it is empty, or neither an image nor a sound.
    """
    if not data:
        raise UnknownFile("the file is empty", param)
    if _IMAGE.match(data):
        return "image"
    if _SOUND.match(data):
        return "sound"
    raise UnknownFile(
        f"the file is neither an image ({', '.join(IMAGE_FORMATS)}) nor a sound (wav, mp3, flac, ogg, webm, m4a)", param
    )
