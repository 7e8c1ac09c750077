"""Features of image files, from the feature store."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.errors import TrainingError
from mmllm_core.vision import feature_key


class StoredFeatures:
    """Features of image files from the store; a missing one is an error that names the image."""

    def __init__(self, store: Path, fingerprint: str):
        self._store = FeatureStore(store)
        self._fingerprint = fingerprint

    def __call__(self, path: Path) -> NDArray[np.float16]:
        """Features (n_patches, d_vision) of an image file.

        Raises:
            TrainingError: the image was not embedded.
        """
        with Image.open(path) as image:
            found = self._store.get(feature_key(image.convert("RGB"), self._fingerprint))
        if found is None:
            raise TrainingError(f"{path}: no stored features: run 'mmllm embed' first")
        return found
