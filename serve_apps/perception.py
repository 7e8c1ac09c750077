"""What is seen and heard in a request: CLIP and Whisper at the same time, and only where it is not known already.

In: sources of images and sounds. Out: features and transcripts, in order. An uploaded file was seen or heard when it
was uploaded, and is again only if what saw or heard it has changed; clients that send an image anew with every turn
find its features here, by the hash of its bytes. Does not know HTTP or the LM.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmllm_core.data.feature_shards import Features
from mmllm_core.errors import ImageError
from serve_apps.all_or_none import all_or_none
from serve_apps.asking import ask
from serve_apps.content_hash import content_hash
from serve_apps.embeddings import Embeddings, TypedText
from serve_apps.feature_cache import FeatureCache
from serve_apps.image_fetch import ImageFetcher
from serve_apps.media import FileUse, ImageSource, LinkedImage, SoundSource
from serve_apps.metrics import counter
from serve_apps.stored_file import HeardText, Kind, Seen
from serve_apps.upload import Upload

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from mmllm_core.bundle import Bundle
    from serve_apps.config import WhisperConfig


@dataclass(frozen=True)
class Fingerprints:
    """Of what sees and what hears: what they gave once is what they would give again."""

    vision: str
    audio: str

    @classmethod
    def of(cls, bundle: "Bundle", config: "WhisperConfig") -> "Fingerprints":
        """Of a bundle's CLIP, and of its Whisper as a config runs it."""
        audio = config.audio(bundle.profile.audio).model_dump_json()
        return cls(bundle.info.feature_fingerprint, hashlib.sha256(audio.encode()).hexdigest()[:16])


@dataclass(frozen=True)
class Perception:
    """What was seen and heard in one request."""

    features: Features | None  # (n_images, n_patches, d_vision)
    transcripts: list[str]
    tiers: list[str]
    """Where each image's features were found: `ingress`, `file`, or as `Seen.tier`."""
    audio_seconds: float = 0.0
    """That were transcribed for it."""


class Perceiver:
    """Sees and hears by the deployments.

    Args:
        clip, whisper: handles of `ClipDeployment` and `WhisperDeployment`.
        fetcher: of images at URLs, where they are allowed.
        cache_bytes: features that are remembered here, so that a repeated image costs no call.
    """

    def __init__(
        self,
        clip: "DeploymentHandle",
        whisper: "DeploymentHandle",
        fingerprints: Fingerprints,
        fetcher: ImageFetcher | None = None,
        cache_bytes: int = 0,
    ):
        self._clip = clip
        self._whisper = whisper
        self._fingerprints = fingerprints
        self._fetcher = fetcher
        self._cache = FeatureCache(cache_bytes)
        self._known = counter("mmllm_images")

    async def perceive(
        self, images: Sequence[ImageSource], sounds: Sequence[SoundSource], traceparent: str = ""
    ) -> Perception:
        """See and hear one request; what still runs when one part fails is cancelled.

        Args:
            traceparent: below which this is traced.

        Raises:
            ImageError, AudioError: something cannot be used; it names the field.
        """
        seen, heard = await all_or_none([self._see_all(images, traceparent), self._hear_all(sounds, traceparent)])
        features = np.stack([features for features, _ in seen]) if seen else None  # (n_images, n_patches, d_vision)
        seconds = sum(seconds for _, seconds in heard)
        return Perception(features, [text for text, _ in heard], [tier for _, tier in seen], seconds)

    async def examine(self, kind: Kind, upload: Upload) -> Seen | HeardText:
        """See or hear a file that is being uploaded.

        Raises:
            ImageError, AudioError: it cannot be used.
        """
        if kind == "image":
            seen: list[Seen] = await ask(lambda: self._clip.see.remote([upload]))
            return seen[0]
        text, _ = await self._transcribe(upload)
        return HeardText(fingerprint=self._fingerprints.audio, text=text)

    async def embed(self, inputs: Sequence[ImageSource | TypedText], dimensions: int | None) -> Embeddings:
        """Vectors of images and texts.

        Raises:
            ImageError, BadInput: as `ClipDeployment.embed`.
        """
        given = await all_or_none(_as_it_is(one) if isinstance(one, TypedText) else self._upload(one) for one in inputs)
        embeddings: Embeddings = await ask(lambda: self._clip.embed.remote(given, dimensions))
        return embeddings

    async def _see_all(self, images: Sequence[ImageSource], traceparent: str) -> list[tuple[Features, str]]:
        """Each image's features, and where they were found."""
        names = await all_or_none(_name(image) for image in images)
        found = await all_or_none(map(self._known_features, images, names))
        unknown = [i for i, known in enumerate(found) if known is None]
        if unknown:
            uploads = await all_or_none(self._upload(images[i]) for i in unknown)
            told = await ask(lambda: self._clip.see.remote(uploads, traceparent))
            for i, seen in zip(unknown, told, strict=True):
                found[i] = seen.features, seen.tier
                await self._keep_features(images[i], names[i], seen)
        return [known for known in found if known is not None]

    async def _hear_all(self, sounds: Sequence[SoundSource], traceparent: str) -> Any:
        return await all_or_none(self._hear(sound, traceparent) for sound in sounds)

    async def _hear(self, sound: SoundSource, traceparent: str) -> tuple[str, float]:
        """What was said, and the seconds that were transcribed for it."""
        if isinstance(sound, Upload):
            return await self._transcribe(sound, traceparent)
        seconds, text = 0.0, await asyncio.to_thread(sound.file.transcript, self._fingerprints.audio)
        if text is None:
            text, seconds = await self._transcribe(await _content(sound), traceparent)
            await _keep(sound, HeardText(fingerprint=self._fingerprints.audio, text=text))
        return text, seconds

    async def _transcribe(self, upload: Upload, traceparent: str = "") -> tuple[str, float]:
        transcript = await ask(lambda: self._whisper.transcribe.remote(upload, traceparent))
        return transcript.text, transcript.seconds

    async def _known_features(self, image: ImageSource, name: str | None) -> tuple[Features, str] | None:
        tier, found = "ingress", None
        if name is not None:
            found = self._cache.get(name)
        elif isinstance(image, FileUse):
            tier, found = "file", await asyncio.to_thread(image.file.features, self._fingerprints.vision)
        if found is None:
            return None
        self._known.inc(1, {"tier": tier})
        return found, tier

    async def _keep_features(self, image: ImageSource, name: str | None, seen: Seen) -> None:
        if name is not None:
            self._cache.put(name, seen.features.copy())  # a view would keep all images of the request in memory
        await _keep(image, seen)

    async def _upload(self, image: ImageSource) -> Upload:
        if isinstance(image, FileUse):
            return await _content(image)
        if isinstance(image, LinkedImage):
            if self._fetcher is None:
                raise ImageError("images are not fetched from URLs here: send a data URI", image.param)
            return Upload(await self._fetcher.fetch(image.url, image.param), image.param)
        return image


async def _name(image: ImageSource) -> str | None:
    """What the features of an image that the request brings are remembered by; a URL may show another every time."""
    return await content_hash(image.data) if isinstance(image, Upload) else None


async def _as_it_is(text: TypedText) -> TypedText:
    return text


async def _content(use: FileUse) -> Upload:
    return Upload(await asyncio.to_thread(use.file.content), use.param)


async def _keep(source: ImageSource | SoundSource, perceived: Seen | HeardText) -> None:
    if isinstance(source, FileUse):
        await asyncio.to_thread(source.file.keep, perceived)
