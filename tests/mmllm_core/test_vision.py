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
from mmllm_core.vision import MAX_SIDE, MIN_SIDE, ClipEncoder, decode_image, pixel_hash, size_problem

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


@pytest.mark.parametrize("size", [(MIN_SIDE - 1, 40), (40, MIN_SIDE - 1), (1, 1)])
def test_a_dot_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{size[0]}x{size[1]}"):
        decode_image(encoded(Image.new("RGB", size)), LIMIT)
    assert decode_image(encoded(Image.new("RGB", (MIN_SIDE, MIN_SIDE))), LIMIT).size == (MIN_SIDE, MIN_SIDE)


def test_a_side_beyond_all_measure_is_refused_whatever_the_pixels() -> None:
    class Header:
        width, height = size = (MAX_SIDE + 1, 400)

    assert "4 to 16384" in str(size_problem(Header(), 10**9))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_every_mode_that_files_hold_becomes_rgb(mode: str, kind: str) -> None:
    image = Image.new("RGBA", (16, 12), (200, 0, 0, 255)).convert("RGB").convert("L" if mode == "PA" else mode)
    found = decode_image(encoded(image.convert("RGBA") if kind == "WEBP" else image, kind), LIMIT)
    assert (found.mode, found.size) == ("RGB", (16, 12))


def test_cmyk_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (220, 20, 20)).convert("CMYK")
    pixel = np.asarray(decode_image(encoded(red, "JPEG", quality=95), LIMIT))[8, 8].astype(int)
    assert np.abs(pixel - (220, 20, 20)).max() < 12


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (2, (47, 0)), (3, (47, 39)), (4, (0, 39)), (6, (39, 0)), (8, (0, 47))]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_says_where_up_is(orientation: int, corner: tuple[int, int], kind: str) -> None:
    image = Image.new("RGB", (48, 40), "white")
    image.paste((0, 0, 0), (0, 0, 16, 16))  # the corner that is at the top left before it is turned
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixel = decode_image(encoded(image, kind, exif=exif), LIMIT).getpixel(corner)
    assert isinstance(pixel, tuple)
    assert max(pixel) < 60


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_of_every_kind_of_animation_the_first_frame_is_seen(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data, LIMIT).getpixel((3, 3)) == (255, 0, 0)


def test_a_picture_within_the_limit_whose_frame_is_not_is_refused() -> None:
    data = bytearray(encoded(Image.new("RGB", (64, 64), "red"), "GIF"))
    data[6:10] = struct.pack("<HH", 8, 8)  # the screen that the header promises; the frame keeps its size
    with pytest.raises(ImageError):
        decode_image(bytes(data), 32 * 32)


def test_16_bits_a_colour_become_8() -> None:
    raw = b"".join(b"\0" + struct.pack(">HHH", 65535, 0x8000, 0) * 8 for _ in range(8))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert decode_image(png, LIMIT).getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_half_a_file_is_never_half_a_picture(kind: str) -> None:
    whole = encoded(picture(200, 160), kind)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError):
            decode_image(whole[: int(len(whole) * share)], LIMIT)


def test_a_file_that_calls_itself_something_else_is_told_by_its_bytes() -> None:
    stream = io.BytesIO()
    picture().save(stream, "TIFF")
    with pytest.raises(ImageError, match="PNG, JPEG"):
        decode_image(stream.getvalue(), LIMIT)


def test_whole_images_are_unit_vectors_alike_alone_and_in_a_batch(tiny_clip: Callable[..., Path]) -> None:
    clip = encoder(tiny_clip())
    pixels = clip.preprocess([picture(), picture(seed=1)])
    both = clip.embed_pixels(pixels)
    assert (both.shape, both.dtype) == ((2, clip.d_embedding), np.float32)
    assert np.allclose(np.linalg.norm(both, axis=1), 1, atol=1e-5)
    assert np.allclose(clip.embed_pixels(pixels[1:])[0], both[1], atol=1e-5)
    assert not np.allclose(both[0], both[1], atol=1e-3)
