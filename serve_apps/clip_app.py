"""CLIP as a deployment: image files -> features.

In: the bytes of images. Out: contiguous float16 (n_images, n_patches, d_vision). Features are looked for in
the replica's memory, then in the feature store, and only then computed, in batches that form across requests.
What others add to the store is seen while the replica runs; what is damaged there is computed.
Does not know HTTP, conversations, the connector or the LM.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from ray import serve

from mmllm_core.bundle import Bundle
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.errors import FeatureStoreError
from mmllm_core.vision import decode_image
from serve_apps.config import ClipConfig
from serve_apps.metrics import counter, histogram
from serve_apps.observability_config import ObservabilityConfig
from serve_apps.tracing import Trace, start_tracing
from serve_apps.upload import Upload
from serve_apps.work_in_flight import RequestWork, WorkInFlight

Features = NDArray[np.float16]
_log = logging.getLogger(__name__)


class ClipDeployment:
    """Runs the vision tower of a bundle.

    Raises:
        BundleError, WeightsError: the bundle cannot be opened, which ends the replica's start.
        FeatureStoreError: the feature store cannot be reached, which ends it too.
    """

    def __init__(self, bundle: Path, config: ClipConfig, observability: ObservabilityConfig = ObservabilityConfig()):
        import torch

        torch.set_num_threads(config.n_threads)
        opened = Bundle.open(bundle)
        self._encoder = opened.load_vision(config.device)
        self._max_pixels = opened.profile.vision.max_pixels
        self._cache = FeatureCache(config.cache_bytes)
        location = config.feature_store
        self._stored = StoreReader(location, self._encoder.fingerprint, config.store_refresh_s) if location else None
        # Two at a time bounds the memory of decoded pixels, whatever a request holds.
        self._decoding = ThreadPoolExecutor(max_workers=2, thread_name_prefix="decode-image")
        self._work = WorkInFlight("vision", "images")
        self._tracer = start_tracing(observability, "vision")
        self._seen, self._batches = counter("mmllm_images"), histogram("mmllm_clip_batch_images")
        self._encode_batch.set_max_batch_size(config.max_batch_size)
        self._encode_batch.set_batch_wait_timeout_s(config.batch_wait_s)

    async def encode(self, images: Sequence[Upload], traceparent: str = "") -> Features:
        """Features of one request's images, in their order.

        Args:
            traceparent: below which this is traced.

        Returns:
            float16 (n_images, n_patches, d_vision), contiguous.

        Raises:
            ImageError: an image cannot be used; it names the field.
        """
        with self._work.request(len(images)) as work, Trace(self._tracer, traceparent).span("vision") as (span, _):
            span.set_attribute("mmllm.images", len(images))
            return np.stack(await asyncio.gather(*(self._features(image, work) for image in images)))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for the images that wait or are encoded."""
        return self._work.stats()

    async def _features(self, upload: Upload, work: RequestWork) -> Features:
        loop = asyncio.get_running_loop()
        key, image = await loop.run_in_executor(self._decoding, self._identify, upload)
        self._work.begin(work)
        tier, found = "memory", self._cache.get(key)
        if found is None and self._stored is not None:
            tier, found = "store", await self._stored.get(key)
        if found is None:
            tier, found = "computed", await self._encode_batch(image)
        self._seen.inc(1, {"tier": tier})
        self._cache.put(key, found)
        return found

    def _identify(self, upload: Upload) -> tuple[str, Image.Image]:
        image = decode_image(upload.data, self._max_pixels, upload.param)
        return self._encoder.key(image), image

    @serve.batch
    async def _encode_batch(self, images: list[Image.Image]) -> list[Features]:
        self._batches.observe(len(images))
        features = await asyncio.to_thread(self._encoder.encode, images)  # (b, n_patches, d_vision)
        return [row.copy() for row in features]  # a view would keep its whole batch in memory


class StoreReader:
    """Reads a feature store without holding up the event loop, and looks for new shards now and then.

    A store that cannot be reached for a while costs its features, not the request.

    Args:
        refresh_s: seconds between looks for shards that others have added; a look is taken only after a miss, and
            nobody waits for it.
    """

    def __init__(self, location: str | Path, fingerprint: str, refresh_s: float):
        self._store = FeatureStore(location, fingerprint)
        self._reading = ThreadPoolExecutor(max_workers=4, thread_name_prefix="read-features")
        self._refreshing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="refresh-features")
        self._refresh_s = refresh_s
        self._next_refresh = time.monotonic() + refresh_s

    async def get(self, key: str) -> Features | None:
        """Features (n_patches, d_vision) by key, or None if they are not stored whole."""
        found = None
        if key in self._store:
            found = await asyncio.get_running_loop().run_in_executor(self._reading, self._read, key)
        if found is None and time.monotonic() >= self._next_refresh:
            self._next_refresh = time.monotonic() + self._refresh_s
            self._refreshing.submit(self._refresh)
        return found

    def _read(self, key: str) -> Features | None:
        try:
            return self._store.get(key)
        except FeatureStoreError as error:
            _log.warning("features are computed instead of read: %s", error)
            return None

    def _refresh(self) -> None:
        try:
            self._store.refresh()
        except FeatureStoreError as error:
            _log.warning("new features are not seen yet: %s", error)


class FeatureCache:
    """The features that were used last, up to a number of bytes."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._features: OrderedDict[str, Features] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: str) -> Features | None:
        """Features (n_patches, d_vision) by key, or None."""
        found = self._features.get(key)
        if found is not None:
            self._features.move_to_end(key)
        return found

    def put(self, key: str, features: Features) -> None:
        """Remember features, and forget the ones that were used longest ago to make room."""
        if key in self._features:
            self._features.move_to_end(key)
            return
        self._features[key] = features
        self._n_bytes += features.nbytes
        while self._n_bytes > self._max_bytes:
            _, forgotten = self._features.popitem(last=False)
            self._n_bytes -= forgotten.nbytes
