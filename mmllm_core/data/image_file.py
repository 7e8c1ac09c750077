"""Whether a training image is there and whole, told without decoding it where its own bytes tell.

In: a path. Out: a `Fault` or None. Knows what `mmllm_core.vision` will accept later and nothing of rows.
"""

import os
import warnings
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from mmllm_core.data.record import Fault, FaultKind
from mmllm_core.errors import ImageError
from mmllm_core.vision import IMAGE_FORMATS, decode_image, size_problem

_PNG_END = bytes.fromhex("0000000049454e44ae426082")


def image_fault(path: Path, *, max_pixels: int, decode: bool = False) -> Fault | None:
    """What is wrong with an image file.

    The header is read always (about 0.1 ms). Files that do not end as their format does (cut downloads, above all) are
    decoded to find out; damage in the middle of a file that ends well is found with `decode` alone.

    Args:
        max_pixels: width times height that the vision tower's config allows.
        decode: decode every file in full (a few ms each).
    """
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked next
            image = Image.open(stream, formats=IMAGE_FORMATS)
            if (problem := size_problem(image, max_pixels)) is not None:
                return Fault(FaultKind.BROKEN_IMAGE, f"{path}: {problem}")
            whole = _ends_well(stream, image.format or "")
        if decode or not whole:
            decode_image(path.read_bytes(), max_pixels)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return Fault(FaultKind.MISSING_IMAGE, f"{path}: no such file")
    except (ImageError, UnidentifiedImageError, Image.DecompressionBombError):
        return Fault(FaultKind.BROKEN_IMAGE, f"{path}: is not a whole {', '.join(IMAGE_FORMATS)} file")
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # ValueError: a name with a NUL or a surrogate
        return Fault(FaultKind.BROKEN_IMAGE, f"{path}: cannot be read: {error}")
    return None


def _ends_well(stream: IO[bytes], image_format: str) -> bool:
    size = os.fstat(stream.fileno()).st_size
    stream.seek(max(0, size - len(_PNG_END)))
    tail = stream.read()
    stream.seek(0)
    head = stream.read(8)
    if image_format == "JPEG":
        return tail.endswith(b"\xff\xd9")
    if image_format == "PNG":
        return tail == _PNG_END
    if image_format == "GIF":
        return tail.endswith(b";")
    length = int.from_bytes(head[4:8] if image_format == "WEBP" else head[2:6], "little")
    return size >= length + (8 if image_format == "WEBP" else 0)
