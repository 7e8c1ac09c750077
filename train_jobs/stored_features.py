"""Features of image files, from the feature store."""

from collections.abc import Iterable
from pathlib import Path

from mmllm_core.config import VisionConfig
from mmllm_core.data.feature_shards import Features
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.data.image_keys import ImageKeys
from mmllm_core.errors import ImageError, TrainingError
from mmllm_core.models.home import features_cache_bytes, image_keys
from mmllm_core.vision import feature_key

_MAX_PIXELS: int = VisionConfig.model_fields["max_pixels"].default


class StoredFeatures:
    """Features of image files from the store; a missing one is an error that names the image.

    Args:
        store: a folder or a URL. Shards at a URL are copied to this machine as they are read.
        fingerprint: of the encoder whose features are wanted.
        max_pixels: as in the profile's vision config.
    """

    def __init__(self, store: str | Path, fingerprint: str, max_pixels: int = _MAX_PIXELS):
        self._store = FeatureStore(store, fingerprint, cache_bytes=features_cache_bytes())
        self._fingerprint = fingerprint
        self._keys = ImageKeys(image_keys(), max_pixels)

    def known_lack(self, paths: Iterable[Path]) -> Path | None:
        """The first image that is not there, or whose features are known not to be stored; nothing is decoded.

        Of images that this machine never decoded nothing is known.
        """
        for path in paths:
            pixels = self._keys.remembered(path)
            known = feature_key(pixels, self._fingerprint) in self._store if pixels else path.is_file()
            if not known:
                return path
        return None

    def find(self, path: Path) -> Features | None:
        """Features (n_patches, d_vision) of an image file, if whole ones are stored.

        Raises:
            TrainingError: the image cannot be read.
        """
        try:
            key = feature_key(self._keys.pixel_hash(path), self._fingerprint)
        except ImageError as error:
            raise TrainingError(str(error)) from error
        return self._store.get(key)

    def __call__(self, path: Path) -> Features:
        """Features (n_patches, d_vision) of an image file.

        Raises:
            TrainingError: the image cannot be read, or was not embedded, or what was stored of it is damaged.
        """
        found = self.find(path)
        if found is None:
            self._store.refresh()
            found = self.find(path)
        if found is None:
            raise TrainingError(f"{path}: no stored features that are whole: run 'mmllm embed RECIPE' first")
        return found
