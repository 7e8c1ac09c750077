"""Training finds the features of an image file, or says what to do."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.errors import TrainingError
from mmllm_core.vision import decode_image, feature_key, pixel_hash
from train_jobs.stored_features import StoredFeatures

ENCODER = "0123456789abcdef"
VALUES = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float16)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8))


def embed(path: Path, store: Path) -> None:
    FeatureStore(store).write([feature_key(pixel_hash(decode_image(path.read_bytes(), 10_000)), ENCODER)], VALUES)


def test_a_rotated_photo_is_found_as_it_was_embedded(tmp_path: Path) -> None:
    path, exif = tmp_path / "rotated.jpg", Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    picture().save(path, exif=exif)
    embed(path, tmp_path / "store")
    assert np.array_equal(StoredFeatures(tmp_path / "store", ENCODER)(path), VALUES[0])


def test_a_transparent_picture_is_found_as_it_was_embedded(tmp_path: Path) -> None:
    path, image = tmp_path / "transparent.png", picture().convert("RGBA")
    image.putalpha(60)
    image.save(path)
    embed(path, tmp_path / "store")
    assert np.array_equal(StoredFeatures(tmp_path / "store", ENCODER)(path), VALUES[0])


def test_an_image_is_decoded_once(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    embed(path, tmp_path / "store")
    features = StoredFeatures(tmp_path / "store", ENCODER)
    features(path)
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)  # would not decode
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert np.array_equal(features(path), VALUES[0])


def test_what_is_known_to_lack_is_told_without_decoding(tmp_path: Path) -> None:
    stored, unknown, forgotten, gone = (tmp_path / name for name in ("a.png", "b.png", "c.png", "d.png"))
    picture().save(stored)
    embed(stored, tmp_path / "store")
    features = StoredFeatures(tmp_path / "store", ENCODER)
    features(stored)
    unknown.write_bytes(b"nobody looked at it yet")
    Image.new("RGB", (9, 9)).save(forgotten)
    with pytest.raises(TrainingError):
        features(forgotten)
    assert features.known_lack([stored, unknown]) is None
    assert features.known_lack([stored, unknown, forgotten, gone]) == forgotten
    assert features.known_lack([stored, gone]) == gone


def test_features_that_are_added_later_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    features = StoredFeatures(tmp_path / "store", ENCODER)
    with pytest.raises(TrainingError, match=r"a\.png: no stored features.*mmllm embed"):
        features(path)
    embed(path, tmp_path / "store")
    assert np.array_equal(features(path), VALUES[0])


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"absent\.png: cannot be read"):
        StoredFeatures(tmp_path / "store", ENCODER)(tmp_path / "absent.png")
