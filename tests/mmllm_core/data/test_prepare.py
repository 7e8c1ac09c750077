"""Published datasets: files placed by hand, images that are named and no other, and no network."""

import zipfile
from pathlib import Path

import pytest

from mmllm_core.data import prepare as module
from mmllm_core.data.prepare import extract_images, prepare
from mmllm_core.errors import WeightsError
from tests.mmllm_core.data.conftest import WriteFile, llava


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "train2017.zip"
    with zipfile.ZipFile(path, "w") as opened:
        for name in ("train2017/a.jpg", "train2017/b.jpg", "train2017/sub/c.jpg", "../escaped.jpg", "other/a.jpg"):
            opened.writestr(name, f"picture {name}")
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_only_images_that_are_named_are_unpacked(archive: Path, tmp_path: Path) -> None:
    found = extract_images(archive, {"a.jpg", "sub/c.jpg", "none.jpg"}, tmp_path / "images", "train2017/")
    assert found == {"a.jpg", "sub/c.jpg"}
    assert files(tmp_path / "images") == ["a.jpg", "sub/c.jpg"]
    assert (tmp_path / "images" / "a.jpg").read_text() == "picture train2017/a.jpg"


def test_a_name_that_leads_out_of_the_folder_is_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="unsafe path"):
        extract_images(archive, {"../escaped.jpg"}, tmp_path / "in" / "images")
    assert not (tmp_path / "in" / "escaped.jpg").exists()


def test_a_cut_archive_is_told(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(WeightsError, match="not a whole zip"):
        extract_images(archive, {"a.jpg"}, tmp_path / "images", "train2017/")


def test_a_damaged_member_leaves_no_image_behind(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes().replace(b"picture train2017/a", b"picture train2017/x"))
    with pytest.raises(WeightsError, match="not a whole zip"):
        extract_images(archive, {"a.jpg"}, tmp_path / "images", "train2017/")
    assert not (tmp_path / "images" / "a.jpg").exists()


def test_files_placed_by_hand_need_no_network(archive: Path, write: WriteFile, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [
        llava("1", "<image>", "x", image="a.jpg"),
        llava("2", "<image>", "x", image="none.jpg"),
        llava("3", "H", "i"),
    ]
    write(rows).rename(folder / "llava_instruct_150k.json")
    archive.rename(folder / "train2017.zip")
    ready = prepare("llava-instruct-150k", folder)
    assert (ready.named, ready.absent) == (2, 1)
    assert files(ready.images) == ["a.jpg"]


def test_with_all_images_there_no_archive_is_needed(write: WriteFile, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").touch()
    write([llava("1", "<image>", "x", image="a.jpg")]).rename(folder / "blip_laion_cc_sbu_558k.json")
    assert prepare("llava-pretrain-558k", folder).absent == 0


@pytest.mark.parametrize("name", module.PUBLICATIONS)
def test_without_the_hub_it_says_where_to_put_the_file(
    name: module.LlavaDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="check the network") as caught:
        prepare(name, tmp_path / "set")
    message = str(caught.value)
    assert str(tmp_path / "set" / module.PUBLICATIONS[name].file) in message
    assert module.PUBLICATIONS[name].page in message
    assert "\n" not in message
