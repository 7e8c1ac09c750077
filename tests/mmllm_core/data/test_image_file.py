"""Missing, cut and damaged image files are told apart from whole ones."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmllm_core.data.image_file import image_fault
from mmllm_core.data.record import FaultKind

FORMATS = ["png", "jpg", "webp", "gif", "bmp"]


@pytest.fixture
def noise(tmp_path: Path) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def kind(path: Path, **options: bool) -> FaultKind | None:
    fault = image_fault(path, max_pixels=10_000, **options)
    return fault.kind if fault else None


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("decode", [False, True])
def test_a_whole_file_is_fine(tmp_path: Path, noise: Image.Image, ending: str, decode: bool) -> None:
    noise.save(tmp_path / f"a.{ending}")
    assert kind(tmp_path / f"a.{ending}", decode=decode) is None


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_a_cut_file_is_broken_without_decoding_all(
    tmp_path: Path, noise: Image.Image, ending: str, share: float
) -> None:
    path = tmp_path / f"a.{ending}"
    noise.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert kind(path) is FaultKind.BROKEN_IMAGE


def test_a_whole_jpeg_with_bytes_behind_it_is_fine(tmp_path: Path, noise: Image.Image) -> None:
    noise.save(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as stream:
        stream.write(b"\0" * 20)
    assert kind(tmp_path / "a.jpg") is None


def test_damage_in_the_middle_is_found_by_decoding(tmp_path: Path, noise: Image.Image) -> None:
    path = tmp_path / "a.png"
    noise.save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert kind(path) is None
    assert kind(path, decode=True) is FaultKind.BROKEN_IMAGE


def test_what_is_no_image_is_broken_and_what_is_not_there_is_missing(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    assert kind(tmp_path / "page.jpg") is FaultKind.BROKEN_IMAGE
    assert kind(tmp_path / "none.jpg") is FaultKind.MISSING_IMAGE
    assert kind(tmp_path) is FaultKind.MISSING_IMAGE
    assert kind(tmp_path / "nul\0.jpg") is FaultKind.BROKEN_IMAGE


def test_a_larger_image_than_the_model_takes_is_broken(tmp_path: Path) -> None:
    Image.new("RGB", (101, 100)).save(tmp_path / "a.png")
    fault = image_fault(tmp_path / "a.png", max_pixels=10_000)
    assert fault is not None
    assert "101x100" in fault.detail


def test_a_strip_that_training_would_refuse_is_broken(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1)).save(tmp_path / "a.png")
    fault = image_fault(tmp_path / "a.png", max_pixels=10_000)
    assert fault is not None
    assert "2000x1" in fault.detail
