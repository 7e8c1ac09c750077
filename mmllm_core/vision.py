"""Images -> features: safe decoding, content keys, and a CLIP model's preprocessing before its vision tower.

In: bytes or PIL images. Out: float16 features (n_images, n_patches, d_vision) and the keys under which
they may be stored. Does not know the connector or the LM, so a new connector never invalidates features.

Weights lie in open_clip's own folder layout: `open_clip_config.json` and `open_clip_model.safetensors`.
"""

import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mmllm_core.config import VisionConfig
from mmllm_core.errors import ImageError, WeightsError

if TYPE_CHECKING:
    import torch

CLIP_CONFIG = "open_clip_config.json"
CLIP_WEIGHTS = "open_clip_model.safetensors"
MAX_ASPECT_RATIO = 100
"""Longer side over shorter: CLIP's preprocessing scales the shorter side up, and crops the longer one only then."""
MIN_SIDE, MAX_SIDE = 4, 16_384
"""Pixels of a side: a dot shows nothing, and the decoders' own limits begin beyond the most."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def decode_image(data: bytes, max_pixels: int, param: str | None = None) -> Image.Image:
    """Decode an image to upright RGB of 8 bits.

    Of an animation the first frame is seen, of a file that holds several pictures the first. EXIF's orientation is
    applied, palettes and CMYK are converted, transparent areas become white, and 16 bits a channel become 8.

    Args:
        max_pixels: width times height allowed, checked from the header before any pixel is decoded.
        param: the request field that the bytes came from, for the error.

    Raises:
        ImageError: empty, not one of `IMAGE_FORMATS`, truncated, larger than `max_pixels`, with a side outside of
            `MIN_SIDE` to `MAX_SIDE`, or a strip longer than `MAX_ASPECT_RATIO`.
    """
    if not data:
        raise ImageError("the image is empty", param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked next
            image: Image.Image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            if (problem := size_problem(image, max_pixels)) is not None:
                raise ImageError(f"the image {problem}", param)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow would clip its 65,536 grays to 256 instead of scaling them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:  # transparent areas are shown on white
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return image.convert("RGB")
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes of them
        raise ImageError(f"the image could not be read: send a whole {', '.join(IMAGE_FORMATS)} file", param) from error


def size_problem(image: Image.Image, max_pixels: int) -> str | None:
    """Why an image is not decoded, told from its header, or None; it continues a sentence about the image."""
    size = f"has {image.width}x{image.height} pixels and"
    if image.width * image.height > max_pixels:
        return f"{size} at most {max_pixels} are allowed: send a smaller one"
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        return f"{size} one side may be at most {MAX_ASPECT_RATIO} times the other: cut it"
    if min(image.size) < MIN_SIDE or max(image.size) > MAX_SIDE:
        return f"{size} a side may have {MIN_SIDE} to {MAX_SIDE}: send another size"
    return None


def pixel_hash(image: Image.Image) -> str:
    """sha256 of size and RGB pixels: equal for equal pictures, however they were compressed."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()


def feature_key(pixels: str, fingerprint: str) -> str:
    """Under which an image's features are stored: its `pixel_hash` and what encodes it."""
    return f"{pixels}-{fingerprint}"


class ClipEncoder:
    """A CLIP model's preprocessing and vision tower, as open_clip builds them.

    Args:
        config: which layer and tokens become features.
        weights: folder in open_clip's layout; only keys under `visual.` are read.
        device: torch device.

    Raises:
        WeightsError: files are missing, or do not fit the architecture or the layer that configs name.
    """

    def __init__(self, config: VisionConfig, weights: Path, device: str = "cpu"):
        from mmllm_core.vision_tower import load_vision_tower

        self.config = config
        self.device = device
        self._weights = weights
        self._clip_config = read_clip_config(weights)
        self.tower = load_vision_tower(config, weights).to(device)
        self._preprocess = _build_preprocess(self._clip_config)

    @property
    def d_vision(self) -> int:
        """Width of a feature."""
        return int(self._clip_config["model_cfg"]["vision_cfg"]["width"])

    @property
    def d_embedding(self) -> int:
        """Width of the space that CLIP shares with texts."""
        return int(self._clip_config["model_cfg"]["embed_dim"])

    @property
    def n_patches(self) -> int:
        """Features an image gives, CLS included where it is kept."""
        return self.tower.n_patches

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over architecture, preprocessing, weights, layer and tokens: what features depend on."""
        digest = hashlib.sha256(json.dumps(self._clip_config, sort_keys=True).encode())
        digest.update(file_sha256(self._weights / CLIP_WEIGHTS).encode())
        layout = {"layer": self.config.feature_layer, "cls": self.config.cls_token, "merge": self.config.merge}
        digest.update(json.dumps(layout, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def key(self, image: Image.Image) -> str:
        """The feature key: content of the image and fingerprint of the encoder."""
        return feature_key(pixel_hash(image), self.fingerprint)

    def preprocess(self, images: Sequence[Image.Image]) -> "torch.Tensor":
        """Scale, crop and normalise images to float32 pixels (n_images, 3, h, w) on the CPU, as CLIP wants them."""
        import torch

        return torch.stack([self._preprocess(image) for image in images])

    def encode(self, images: Sequence[Image.Image]) -> NDArray[np.float16]:
        """Encode a batch.

        Returns:
            float16 (n_images, n_patches, d_vision), contiguous.
        """
        return self.encode_pixels(self.preprocess(images))

    def encode_pixels(self, pixels: "torch.Tensor") -> NDArray[np.float16]:
        """Encode a batch that is preprocessed: float32 (n_images, 3, h, w).

        Returns:
            float16 (n_images, n_patches, d_vision), contiguous.
        """
        import torch

        with torch.inference_mode():
            features = self.tower(pixels.to(self.device))  # (b, n_patches, d_vision)
            return np.ascontiguousarray(features.to(torch.float16).cpu().numpy())

    def embed_pixels(self, pixels: "torch.Tensor") -> NDArray[np.float32]:
        """What whole images are, in the space that CLIP shares with texts (`mmllm_core.text_tower`).

        Args:
            pixels: float32 (n_images, 3, h, w), preprocessed.

        Returns:
            float32 (n_images, d_embedding), each of length one.
        """
        import torch

        with torch.inference_mode():
            pooled = self.tower.visual(pixels.to(self.device, self.tower.dtype))  # (b, d_embedding)
            return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()


def n_features(grid: tuple[int, int], config: VisionConfig) -> int:
    """Features that an image of `grid` (rows, columns) patches gives, CLS included where it is kept."""
    rows, columns = grid
    return (rows // config.merge) * (columns // config.merge) + int(config.cls_token)


def read_clip_config(weights: Path) -> dict[str, Any]:
    """Read `open_clip_config.json`: `model_cfg` and `preprocess_cfg`.

    Raises:
        WeightsError: the file is missing or not JSON.
    """
    path = weights / CLIP_CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error


def file_sha256(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _build_preprocess(clip_config: dict[str, Any]) -> Any:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    values = {"size": clip_config["model_cfg"]["vision_cfg"]["image_size"]} | clip_config.get("preprocess_cfg", {})
    return image_transform_v2(PreprocessCfg(**values), is_train=False)
