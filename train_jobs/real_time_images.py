"""Images as training goes: files -> pixels for a model that holds CLIP's tower, and features where some are asked for.

What `train_jobs.stored_features` reads from the store is computed here. Does not know conversations or the connector.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmllm_core.data.image_keys import ImageKeys
from mmllm_core.errors import ImageError, TrainingError
from mmllm_core.models.home import image_keys
from mmllm_core.vision import ClipEncoder


class RealTimeImages:
    """Images of a run that computes features itself.

    Args:
        encoder: its preprocessing makes pixels; its tower, whatever it has learned by then, makes features.
        max_pixels: as in the profile's vision config.
    """

    def __init__(self, encoder: ClipEncoder, max_pixels: int):
        self._encoder = encoder
        self._keys = ImageKeys(image_keys(), max_pixels)

    def pixels(self, path: Path) -> NDArray[np.float32]:
        """Pixels (3, h, w) as CLIP wants them.

        Raises:
            TrainingError: the image cannot be read; the message names it.
        """
        pixels: NDArray[np.float32] = self._encoder.preprocess([self._image(path)])[0].numpy()
        return pixels

    def __call__(self, path: Path) -> NDArray[np.float16]:
        """Features (n_patches, d_vision), as for `pixels`."""
        features: NDArray[np.float16] = self._encoder.encode([self._image(path)])[0]
        return features

    def _image(self, path: Path) -> Image.Image:
        try:
            return self._keys.decode(path)[1]
        except ImageError as error:
            raise TrainingError(str(error)) from error
