"""Published datasets brought to this machine: the conversations from the Hugging Face hub, the images from an archive.

In: a dataset's name and a folder. Out: the conversation file and the folder of the images that it names, and no other.
Each step is skipped where its files lie already, so a broken run is simply run again and files may be placed by hand.
Does not know how a file is learned from.
"""

import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmllm_core.artifact import require_free_disk
from mmllm_core.data.download import Progress, download
from mmllm_core.data.json_rows import read_rows
from mmllm_core.data.llava import llava_record
from mmllm_core.data.record import MalformedRow
from mmllm_core.errors import DataError, WeightsError
from mmllm_core.models.home import home
from mmllm_core.vision import file_sha256

LlavaDataset = Literal["llava-instruct-150k", "llava-pretrain-558k"]


@dataclass(frozen=True)
class Publication:
    """Where a dataset in LLaVA's format is published."""

    repo: str
    file: str
    archive: str
    """A URL, or the name of a file of the same repository."""
    archive_folder: str
    """Folder inside the archive that image names start from."""

    @property
    def page(self) -> str:
        """Where a person finds it."""
        return f"https://huggingface.co/datasets/{self.repo}"


PUBLICATIONS: dict[LlavaDataset, Publication] = {
    "llava-instruct-150k": Publication(
        repo="liuhaotian/LLaVA-Instruct-150K",
        file="llava_instruct_150k.json",
        archive="http://images.cocodataset.org/zips/train2017.zip",
        archive_folder="train2017/",
    ),
    "llava-pretrain-558k": Publication(
        repo="liuhaotian/LLaVA-Pretrain",
        file="blip_laion_cc_sbu_558k.json",
        archive="images.zip",
        archive_folder="",
    ),
}
"""Liu et al., 2023 (arXiv:2304.08485); Instruct-150K speaks of COCO train2017 (Lin et al., 2014, arXiv:1405.0312)."""


@dataclass(frozen=True)
class Prepared:
    """A dataset that lies ready."""

    file: Path
    images: Path
    named: int
    """Images that the file names."""
    absent: int
    """Of these, images that neither lie in the folder nor in the archive."""


def prepare(
    name: LlavaDataset,
    folder: Path | None = None,
    *,
    revision: str = "main",
    with_images: bool = True,
    progress: Progress = lambda here, total: None,
) -> Prepared:
    """Bring a dataset to `folder`, by default one of its own under the home folder.

    Args:
        revision: branch, tag or commit of the hub's repository; the commit that it meant is recorded beside
            the file.
        with_images: False to fetch the conversations alone.
        progress: told bytes of the archive.

    Raises:
        WeightsError: a file cannot be fetched; the message says where to put it by hand.
        DataError: the conversation file is not in LLaVA's format.
        EnvironmentLack: no space.
    """
    publication = PUBLICATIONS[name]
    folder = folder or home() / "data" / name
    file = _fetch_conversations(publication, folder, revision)
    images = folder / "images"
    names = _image_names(file)
    missing = {image for image in names if not (images / image).is_file()}
    if missing and with_images:
        archive = _fetch_archive(publication, folder, revision, progress)
        missing -= extract_images(archive, missing, images, publication.archive_folder)
    return Prepared(file, images, len(names), len(missing))


def extract_images(archive: Path, names: set[str], folder: Path, archive_folder: str = "") -> set[str]:
    """Unpack the images that are named, each whole or not at all.

    Args:
        archive_folder: folder inside the archive that names start from, with its slash.

    Returns:
        The names that were found.

    Raises:
        WeightsError: the archive is damaged, or a name leads out of `folder`.
        EnvironmentLack: no space.
    """
    found: set[str] = set()
    try:
        with zipfile.ZipFile(archive) as opened:
            wanted = {name: opened.NameToInfo.get(archive_folder + name) for name in sorted(names)}
            members = {name: info for name, info in wanted.items() if info is not None}
            require_free_disk(folder, sum(info.file_size for info in members.values()) / 1e9, "unpacking the images")
            for name, info in members.items():
                target = folder / name
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise WeightsError(f"{archive}: unsafe path '{name}'")
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(target.name + ".partial")
                with opened.open(info) as source, partial.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                partial.rename(target)
                found.add(name)
    except (zipfile.BadZipFile, EOFError) as error:
        raise WeightsError(f"{archive}: is not a whole zip archive: delete it and run this again ({error})") from error
    return found


def _fetch_archive(publication: Publication, folder: Path, revision: str, progress: Progress) -> Path:
    target = folder / publication.archive.rpartition("/")[2]
    url = publication.archive
    if "://" not in url and not target.is_file():
        from huggingface_hub import hf_hub_url

        commit = _commit(publication, revision, target)
        url = hf_hub_url(publication.repo, publication.archive, repo_type="dataset", revision=commit)
    download(url, target, progress=progress)
    return target


def _fetch_conversations(publication: Publication, folder: Path, revision: str) -> Path:
    target = folder / publication.file
    if target.is_file():
        return target
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    commit = _commit(publication, revision, target)
    try:
        hf_hub_download(publication.repo, publication.file, repo_type="dataset", revision=commit, local_dir=folder)
    except (HTTPError, OSError) as error:
        raise _no_hub(publication, target, error) from error
    record = {"repo": publication.repo, "revision": revision, "commit": commit, "sha256": file_sha256(target)}
    (folder / f"{publication.file}.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    return target


def _commit(publication: Publication, revision: str, target: Path) -> str:
    """The commit that a revision means now. Asked first, for it fails at once where there is no network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        commit = HfApi().dataset_info(publication.repo, revision=revision, timeout=20).sha
    except (HTTPError, OSError) as error:
        raise _no_hub(publication, target, error) from error
    assert commit is not None
    return commit


def _no_hub(publication: Publication, target: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{publication.repo}: '{target.name}' cannot be fetched from the Hugging Face hub ({type(error).__name__}): "
        f"check the network and run this again, or download it from {publication.page} and put it at {target}"
    )


def _image_names(file: Path) -> set[str]:
    names: set[str] = set()
    for row in read_rows(file):
        try:
            names.update(llava_record(row.value).images)
        except MalformedRow as error:
            raise DataError(f"{file}: row {row.number}: {error}: delete the file and run this again") from error
    return names
