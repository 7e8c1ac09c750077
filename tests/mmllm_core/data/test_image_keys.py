"""A file is decoded once, and again when it changes."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmllm_core.data.image_keys import ImageKeys
from mmllm_core.errors import ImageError
from mmllm_core.vision import decode_image, pixel_hash

LIMIT = 1_000_000


def save(path: Path, seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    return path


def ruin(path: Path) -> None:
    """Replace the content by something that cannot be decoded, with the same size and times."""
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_hash_is_that_of_the_decoded_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    expected = pixel_hash(decode_image(path.read_bytes(), LIMIT))
    assert ImageKeys(tmp_path / "keys.sqlite", LIMIT).pixel_hash(path) == expected


def test_another_process_need_not_decode_it_again(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    first = ImageKeys(tmp_path / "keys.sqlite", LIMIT).pixel_hash(path)
    ruin(path)
    assert ImageKeys(tmp_path / "keys.sqlite", LIMIT).pixel_hash(path) == first


def test_a_changed_file_is_decoded_again(tmp_path: Path) -> None:
    path, keys = save(tmp_path / "a.png"), ImageKeys(tmp_path / "keys.sqlite", LIMIT)
    first = keys.pixel_hash(path)
    os.utime(path, ns=(1, 1))
    assert keys.remembered(path) is None
    save(path, seed=1)
    assert keys.pixel_hash(path) != first


@pytest.mark.parametrize("content", [None, b"no image"])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.png"):
        ImageKeys(tmp_path / "keys.sqlite", LIMIT).pixel_hash(path)


def test_a_name_that_no_file_can_have_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        ImageKeys(tmp_path / "keys.sqlite", LIMIT).pixel_hash(tmp_path / "a\0.png")


def test_a_memory_that_cannot_be_used_is_replaced_by_the_processs_own(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    (tmp_path / "keys.sqlite").write_bytes(b"not a database" * 100)
    keys = ImageKeys(tmp_path / "keys.sqlite", LIMIT)
    first = keys.pixel_hash(path)
    ruin(path)
    assert keys.pixel_hash(path) == first
