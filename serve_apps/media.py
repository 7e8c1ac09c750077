"""Where the images and sounds of a request come from: its own bytes, files that were uploaded before, or a URL.

In: the strings of a request. Out: sources, whose files exist and whose URLs are of a kind that is fetched; no byte of
an image or a sound was looked at. Does not know HTTP, nor how anything is fetched.
"""

import base64
import binascii
from dataclasses import dataclass

from mmllm_core.errors import AudioError, BadInput, ImageError
from serve_apps.file_store import OwnedFiles
from serve_apps.stored_file import StoredFile
from serve_apps.upload import Upload

FILE_ID_PREFIX = "file-"


@dataclass(frozen=True)
class FileUse:
    """An uploaded file and where in the request it is used."""

    file: StoredFile
    param: str


@dataclass(frozen=True)
class LinkedImage:
    """An image of another server."""

    url: str
    param: str


ImageSource = Upload | FileUse | LinkedImage
SoundSource = Upload | FileUse


@dataclass(frozen=True)
class Elsewhere:
    """What a request may name instead of bringing it along.

    Args:
        files: of who asks; None where no files are kept.
        urls: whether https URLs are fetched.
    """

    files: OwnedFiles | None = None
    urls: bool = False

    def image(self, url: str, param: str) -> ImageSource:
        """The image that a data URI holds, or that a file's id or an https URL names.

        Raises:
            ImageError: it is none of these, or URLs are not fetched here.
            FileMissing, BadInput: as `image_file`.
        """
        if url.startswith("data:"):
            return _data_uri(url, param)
        if url.startswith(FILE_ID_PREFIX):
            return self.image_file(url, param)
        if self.urls and url[:6].lower() == "https:":
            return LinkedImage(url, param)
        others = [kind for kind, is_taken in (("a file's id", self.files), ("an https URL", self.urls)) if is_taken]
        raise ImageError(
            "the image cannot be had from there: give "
            + " or ".join(["a data URI such as 'data:image/png;base64,...'", *others]),
            param,
        )

    def image_file(self, id: str, param: str) -> FileUse:
        """The image that a file's id names.

        Raises:
            FileMissing, BadInput: as `file`.
            ImageError: the file is no image.
        """
        use = self.file(id, param)
        if use.file.record.kind != "image":
            raise ImageError(
                "the file is a sound, and an image is wanted here: sounds go into parts of type 'file'", param
            )
        return use

    def file(self, id: str, param: str) -> FileUse:
        """The file that an id names, image or sound.

        Raises:
            FileMissing: whoever asks has no such file.
            BadInput: no files are kept.
        """
        if self.files is None:
            raise BadInput("files are not kept here: send the image or sound inside the request", param)
        return FileUse(self.files.get(id, param), param)


def decoded(data: str, param: str, error: type[ImageError] | type[AudioError]) -> Upload:
    """Bytes that stand in a request in base64.

    Raises:
        ImageError, AudioError: as `error` says, they are not base64.
    """
    try:
        return Upload(base64.b64decode(data, validate=True), param)
    except (binascii.Error, ValueError):
        raise error("the data is not valid base64", param) from None


def _data_uri(url: str, param: str) -> Upload:
    head, comma, data = url.partition(",")
    media_type, _, encoding = head.removeprefix("data:").partition(";")
    if not comma or not media_type.startswith("image/") or not encoding.endswith("base64"):
        raise ImageError("the data URI must begin with 'data:image/...;base64,'", param)
    return decoded(data, param, ImageError)
