"""Images: safe decoding, content keys, and what the encoder gives."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmllm_core.config import PathSource, VisionConfig
from mmllm_core.errors import ImageError, WeightsError
from mmllm_core.vision import ClipEncoder, decode_image, pixel_hash

LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def bomb() -> bytes:
    """A PNG whose header promises 100,000 x 100,000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", encoded(picture())[:200], b"GIF89a", bomb(), encoded(picture(), "JPEG")[:300], b"%PDF-1.4"],
    ids=["empty", "text", "truncated-png", "header-only", "bomb", "truncated-jpeg", "pdf"],
)
def test_what_is_no_whole_image_is_refused_with_the_field(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data, LIMIT, param="messages.0.content.0.image_url")
    assert caught.value.param == "messages.0.content.0.image_url"


def test_an_image_over_the_pixel_limit_is_refused() -> None:
    with pytest.raises(ImageError, match="48x40"):
        decode_image(encoded(picture()), 48 * 40 - 1)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_equal_pixels_have_equal_hashes_however_they_were_compressed(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert pixel_hash(decode_image(encoded(picture(), kind, **options), LIMIT)) == pixel_hash(picture())


def test_another_shape_of_the_same_bytes_is_another_picture() -> None:
    flat = Image.new("RGB", (8, 2), "red")
    assert pixel_hash(flat) != pixel_hash(flat.resize((2, 8)))


def test_cmyk_becomes_rgb() -> None:
    assert decode_image(encoded(picture().convert("CMYK"), "JPEG"), LIMIT).mode == "RGB"


def test_a_photo_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter
    assert decode_image(encoded(picture(48, 40), "JPEG", exif=exif), LIMIT).size == (40, 48)


def test_transparent_areas_are_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encoded(clear), LIMIT).getpixel((0, 0)) == (255, 255, 255)


def test_of_an_animation_the_first_frame_is_seen() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    red = decode_image(data, LIMIT).getpixel((0, 0))
    assert isinstance(red, tuple)
    assert red[0] > 200 > red[2]


def encoder(folder: Path, **settings: Any) -> ClipEncoder:
    return ClipEncoder(VisionConfig(source=PathSource(path=folder), **settings), folder)


@pytest.mark.parametrize(
    ("settings", "n_patches"),
    [({}, 16), ({"cls_token": True}, 17), ({"merge": 2}, 4), ({"merge": 4, "cls_token": True, "feature_layer": -1}, 2)],
)
def test_features_have_the_shape_that_the_config_says(
    settings: dict[str, Any], n_patches: int, tiny_clip: Callable[..., Path]
) -> None:
    clip = encoder(tiny_clip(), **settings)
    features = clip.encode([picture(), picture(seed=1)])
    assert features.shape == (2, n_patches, clip.d_vision) == (2, clip.n_patches, 32)
    assert features.dtype == np.float16
    assert features.flags.c_contiguous


def test_merging_averages_neighbouring_patches(tiny_clip: Callable[..., Path]) -> None:
    folder = tiny_clip()
    whole = encoder(folder).encode([picture()])[0].astype(np.float32).reshape(4, 4, 32)
    merged = encoder(folder, merge=2).encode([picture()])[0].astype(np.float32)
    assert np.allclose(merged[0], whole[:2, :2].mean((0, 1)), atol=2e-3)


def test_an_image_is_encoded_alike_alone_and_in_a_batch(tiny_clip: Callable[..., Path]) -> None:
    clip = encoder(tiny_clip())
    alone = clip.encode([picture()])[0].astype(np.float32)
    assert np.allclose(clip.encode([picture(seed=1), picture()])[1].astype(np.float32), alone, atol=2e-3)


def test_the_fingerprint_follows_all_that_features_depend_on(tiny_clip: Callable[..., Path]) -> None:
    folder = tiny_clip()
    prints = {
        encoder(folder).fingerprint,
        encoder(folder, feature_layer=-1).fingerprint,
        encoder(folder, cls_token=True).fingerprint,
        encoder(folder, merge=2).fingerprint,
        encoder(tiny_clip(seed=1)).fingerprint,
        encoder(tiny_clip(quick_gelu=True)).fingerprint,
    }
    assert len(prints) == 6
    assert encoder(folder).fingerprint in prints


def test_a_layer_that_the_tower_lacks_is_refused(tiny_clip: Callable[..., Path]) -> None:
    with pytest.raises(WeightsError, match="blocks"):
        encoder(tiny_clip(), feature_layer=-4)


def test_weights_that_do_not_fit_are_one_named_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"open_clip_config\.json"):
        encoder(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_colour_that_is_declared_transparent_is_white(mode: str) -> None:
    colour = (0, 0, 0) if mode == "RGB" else 0
    clear = Image.new(mode, (4, 4), colour)
    assert decode_image(encoded(clear, transparency=colour), LIMIT).getpixel((0, 0)) == (255, 255, 255)


def test_gray_of_16_bits_keeps_its_range() -> None:
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    found = np.asarray(decode_image(encoded(ramp), LIMIT))[..., 0].reshape(-1)
    assert np.abs(found.astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_give_a_picture_or_an_image_error(kind: str) -> None:
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encoded(picture(24, 20), kind), dtype=np.uint8)
    refused = 0
    for _ in range(200):
        damaged = whole.copy()
        damaged[rng.integers(0, min(300, len(whole)), 4)] = rng.integers(0, 256, 4)
        try:
            assert decode_image(damaged.tobytes(), LIMIT).mode == "RGB"
        except ImageError:
            refused += 1
    assert refused


def test_a_file_that_is_no_safetensors_is_one_named_error(tiny_clip: Callable[..., Path]) -> None:
    folder = tiny_clip()
    (folder / "open_clip_model.safetensors").write_bytes(b"garbage" * 9)
    with pytest.raises(WeightsError, match="open_clip_model"):
        encoder(folder)


def test_a_key_is_of_the_picture_and_of_the_encoder(tiny_clip: Callable[..., Path]) -> None:
    folder = tiny_clip()
    first, other = encoder(folder), encoder(folder, merge=2)
    again = decode_image(encoded(picture()), LIMIT)
    assert first.key(picture()) == first.key(again)
    assert first.key(picture()) != first.key(picture(seed=1))
    assert first.key(picture()) != other.key(picture())


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (1010, 10)])
def test_a_strip_that_preprocessing_would_blow_up_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="at most 100 times"):
        decode_image(encoded(Image.new("RGB", size)), 10**6, param="x")
    assert decode_image(encoded(Image.new("RGB", (1000, 10))), 10**6).size == (1000, 10)
