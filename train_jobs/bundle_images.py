"""Image files as a bundle sees them: stored features, and computed ones where none are stored.

A bundle whose CLIP tower was trained has an encoder of its own, of which the store may know nothing yet. Does not know
conversations, the connector or the LM.
"""

from functools import cached_property
from pathlib import Path

from mmllm_core.bundle import Bundle
from mmllm_core.data.feature_shards import Features
from train_jobs.real_time_images import RealTimeImages
from train_jobs.stored_features import StoredFeatures


class BundleImages:
    """Features of image files by a bundle's encoder, which is loaded when the first image needs it.

    Args:
        store: as of `StoredFeatures`. What is computed is not written to it.
        device: of the encoder.
    """

    def __init__(self, bundle: Bundle, store: str | Path, device: str):
        self._bundle, self._device = bundle, device
        self._max_pixels = bundle.profile.vision.max_pixels
        self._stored = StoredFeatures(store, bundle.info.feature_fingerprint, self._max_pixels)

    def __call__(self, path: Path) -> Features:
        """Features (n_patches, d_vision) of an image file.

        Raises:
            TrainingError: the image cannot be read.
        """
        found = self._stored.find(path)
        return found if found is not None else self._computed(path)

    @cached_property
    def _computed(self) -> RealTimeImages:
        return RealTimeImages(self._bundle.load_vision(self._device), self._max_pixels)
