"""CLIP as a deployment: image files -> features; images and texts -> embeddings.

In: the bytes of images, and texts. Out: contiguous float16 (n_images, n_patches, d_vision), or unit vectors in the
space that images and texts share. Features are looked for in the replica's memory, then in the feature store, and
only then computed, in batches that form across requests; an image that several requests bring at once is computed
once. What others add to the store is seen while the replica runs; what is damaged there is computed.
Does not know HTTP, conversations, the connector or the LM.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmllm_core.bundle import Bundle
from mmllm_core.data.feature_shards import Features
from mmllm_core.errors import BadInput
from serve_apps.all_or_none import all_or_none
from serve_apps.batching import Batcher
from serve_apps.config import ClipConfig
from serve_apps.embeddings import Embeddings, TypedText
from serve_apps.feature_cache import FeatureCache, StoreReader
from serve_apps.image_reading import ImageReader, ReadImage
from serve_apps.metrics import counter, histogram
from serve_apps.observability_config import ObservabilityConfig
from serve_apps.single_flight import SingleFlight
from serve_apps.stored_file import Seen
from serve_apps.tracing import Trace, start_tracing
from serve_apps.upload import Upload
from serve_apps.work_in_flight import RequestWork, WorkInFlight

if TYPE_CHECKING:
    import torch

    from mmllm_core.text_tower import ClipTextEncoder


class ClipDeployment:
    """Runs the vision tower of a bundle, and its text tower once it is asked for.

    Raises:
        BundleError, WeightsError: the bundle cannot be opened, which ends the replica's start.
        FeatureStoreError: the feature store cannot be reached, which ends it too.
    """

    def __init__(self, bundle: Path, config: ClipConfig, observability: ObservabilityConfig = ObservabilityConfig()):
        import torch

        torch.set_num_threads(config.n_threads)
        self._bundle = Bundle.open(bundle)
        self._device = config.device
        self._encoder = self._bundle.load_vision(config.device)
        self._reader = ImageReader(self._encoder, self._bundle.profile.vision.max_pixels)
        self._cache = FeatureCache(config.cache_bytes)
        location = config.feature_store
        self._stored = StoreReader(location, self._encoder.fingerprint, config.store_refresh_s) if location else None
        self._flights: SingleFlight[Features] = SingleFlight()
        self._text_tower: asyncio.Task[ClipTextEncoder | None] | None = None
        self._work = WorkInFlight("vision", "images")
        self._tracer = start_tracing(observability, "vision")
        self._seen, self._batches = counter("mmllm_images"), histogram("mmllm_clip_batch_images")
        batches = config.max_batch_size, config.batch_wait_s
        self._encoding: Batcher[torch.Tensor, Features] = Batcher(self._encode_batch, *batches)
        self._embedding_images: Batcher[torch.Tensor, NDArray[np.float32]] = Batcher(self._embed_images, *batches)
        self._embedding_texts: Batcher[list[int], NDArray[np.float32]] = Batcher(self._embed_texts, *batches)

    async def encode(self, images: Sequence[Upload]) -> Features:
        """Features of one request's images, in their order.

        Returns:
            float16 (n_images, n_patches, d_vision), contiguous.

        Raises:
            ImageError: an image cannot be used; it names the field.
        """
        return np.stack([seen.features for seen in await self.see(images)])

    async def see(self, images: Sequence[Upload], traceparent: str = "") -> list[Seen]:
        """As `encode`, image by image and with the key of each.

        Args:
            traceparent: below which this is traced.
        """
        with self._work.request(len(images)) as work, Trace(self._tracer, traceparent).span("vision") as (span, _):
            span.set_attribute("mmllm.images", len(images))
            return await all_or_none(self._see(image, work) for image in images)

    async def embed(self, inputs: Sequence[Upload | TypedText], dimensions: int | None = None) -> Embeddings:
        """Vectors of images and texts, which can be compared with each other.

        Args:
            dimensions: that are wanted, if they matter.

        Raises:
            ImageError, BadInput: something cannot be embedded, there is no text tower, or vectors have other
                dimensions; it names the field.
        """
        have = self._encoder.d_embedding
        if dimensions not in (None, have):
            raise BadInput(f"'dimensions': vectors have {have} here: leave it out", "dimensions")
        with self._work.request(len(inputs)) as work:
            self._work.begin(work)
            tower = await self._texts() if any(isinstance(given, TypedText) for given in inputs) else None
            found = await all_or_none(self._embed(given, tower) for given in inputs)
        return Embeddings(np.stack([vector for vector, _ in found]), sum(tokens for _, tokens in found))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for the images that wait or are encoded."""
        return self._work.stats()

    async def _see(self, upload: Upload, work: RequestWork) -> Seen:
        image = await self._reader.read(upload)
        self._work.begin(work)
        tiers: list[str] = []
        features = await self._flights.run(image.key, lambda: self._find_or_encode(upload, image, tiers))
        tier = tiers[0] if tiers else "shared"
        self._seen.inc(1, {"tier": tier})
        return Seen(image.key, features, tier)

    async def _find_or_encode(self, upload: Upload, image: ReadImage, tiers: list[str]) -> Features:
        """Features, and into `tiers` where they came from."""
        tier, found = "memory", self._cache.get(image.key)
        if found is None and self._stored is not None:
            tier, found = "store", await self._stored.get(image.key)
        tiers.append(tier if found is not None else "computed")
        if found is None:
            found = await self._encoding(await self._reader.pixels(upload, image))
        self._cache.put(image.key, found)
        return found

    async def _embed(
        self, given: Upload | TypedText, tower: "ClipTextEncoder | None"
    ) -> tuple[NDArray[np.float32], int]:
        if isinstance(given, Upload):
            image = await self._reader.decode(given)
            return await self._embedding_images(await self._reader.pixels(given, image)), self._encoder.tower.n_tokens
        if tower is None:
            raise BadInput("this assistant's CLIP has no text tower: embed images alone", given.param)
        tokens = await asyncio.to_thread(tower.tokens, given.text, given.param)
        return await self._embedding_texts(tokens), len(tokens)

    async def _texts(self) -> "ClipTextEncoder | None":
        if self._text_tower is None or (self._text_tower.done() and self._text_tower.exception()):
            self._text_tower = asyncio.create_task(asyncio.to_thread(self._bundle.load_text_tower, self._device))
        return await asyncio.shield(self._text_tower)

    async def _encode_batch(self, pixels: "list[torch.Tensor]") -> list[Features]:
        self._batches.observe(len(pixels))
        features = await asyncio.to_thread(self._encoder.encode_pixels, _stacked(pixels))  # (b, n_patches, d_vision)
        return [row.copy() for row in features]  # a view would keep its whole batch in memory

    async def _embed_images(self, pixels: "list[torch.Tensor]") -> list[NDArray[np.float32]]:
        return list(await asyncio.to_thread(self._encoder.embed_pixels, _stacked(pixels)))  # (b, d_embedding)

    async def _embed_texts(self, tokens: list[list[int]]) -> list[NDArray[np.float32]]:
        tower = await self._texts()
        assert tower is not None
        return list(await asyncio.to_thread(tower.embed, tokens))  # (b, d_embedding)


def _stacked(pixels: "Sequence[torch.Tensor]") -> "torch.Tensor":
    import torch

    return torch.stack(list(pixels))  # (b, 3, h, w)
