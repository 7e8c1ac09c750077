"""Image files -> feature keys, and pixels as the vision tower wants them.

In: the bytes of images. Out: a `ReadImage`. Decoding runs beside the event loop, a few images at a time, and what is
handed on is of the tower's size, so that large pictures take memory only while they are decoded. Bytes that came
before are known by their hash and not decoded again. Does not know features.
"""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmllm_core.vision import ClipEncoder, decode_image
from serve_apps.content_hash import content_hash
from serve_apps.upload import Upload

if TYPE_CHECKING:
    import torch

DECODERS = 2
"""Images that are decoded at a time: each may hold `max_pixels` several times over."""
_REMEMBERED = 16_384
"""Hashes of files whose keys are known: some 3 MB."""


@dataclass(frozen=True)
class ReadImage:
    """An image's feature key, and its pixels float32 (3, h, w) unless the file was known."""

    key: str
    pixels: "torch.Tensor | None"


class ImageReader:
    """Reads images for one encoder.

    Args:
        max_pixels: width times height that an image may have.
    """

    def __init__(self, encoder: ClipEncoder, max_pixels: int):
        self._encoder = encoder
        self._max_pixels = max_pixels
        self._decoding = ThreadPoolExecutor(max_workers=DECODERS, thread_name_prefix="decode-image")
        self._keys: OrderedDict[str, str] = OrderedDict()

    async def read(self, upload: Upload) -> ReadImage:
        """An image's key, from memory if the same bytes came before.

        Raises:
            ImageError: the image cannot be used; it names the field.
        """
        digest = await content_hash(upload.data)
        if (key := self._keys.get(digest)) is not None:
            self._keys.move_to_end(digest)
            return ReadImage(key, None)
        image = await self.decode(upload)
        self._keys[digest] = image.key
        if len(self._keys) > _REMEMBERED:
            self._keys.popitem(last=False)
        return image

    async def decode(self, upload: Upload) -> ReadImage:
        """An image's key and pixels.

        Raises:
            ImageError: the image cannot be used; it names the field.
        """
        return await asyncio.get_running_loop().run_in_executor(self._decoding, self._decode, upload)

    async def pixels(self, upload: Upload, image: ReadImage) -> "torch.Tensor":
        """Pixels float32 (3, h, w) of an image that was read."""
        found = image.pixels if image.pixels is not None else (await self.decode(upload)).pixels
        assert found is not None
        return found

    def _decode(self, upload: Upload) -> ReadImage:
        image = decode_image(upload.data, self._max_pixels, upload.param)
        return ReadImage(self._encoder.key(image), self._encoder.preprocess([image])[0])
