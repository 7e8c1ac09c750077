"""Where a CLIP replica looks for features before it computes them: its own memory, and the feature store.

In: feature keys. Out: features (n_patches, d_vision), or None. Does not know images.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmllm_core.data.feature_shards import Features
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.errors import FeatureStoreError

_log = logging.getLogger(__name__)


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
