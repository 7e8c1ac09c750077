"""The folder that becomes a Space: its program, the code and configs that it runs, pinned requirements, and a bundle.

In: a title and a bundle, or none where the Space fetches one or asks a service. Out: a folder that is whole or absent.
Does not know the hub, and loads no weights.
"""

import shutil
from pathlib import Path

import mmllm_core
import serve_apps
from mmllm_core.artifact import STAMP, building
from mmllm_core.bundle import Bundle
from mmllm_core.errors import ExportError
from serve_apps.space.settings import UPLOADED

_SPACE = Path(__file__).parent
_FILES = ("app.py", "README.md", "requirements.txt")


def write_space(out: Path, title: str, bundle: Bundle | None) -> None:
    """Write a Space.

    Args:
        out: folder to make; it must not exist, or be empty.
        bundle: that is uploaded with it, if any.

    Raises:
        ExportError: the folder holds files already.
        EnvironmentLack: the disk is full or the place cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: exists and is not an empty folder: give another with --out")
    with building(out, {}) as folder:
        for package in (mmllm_core, serve_apps):
            source = Path(str(package.__file__)).parent
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in _FILES:
            (folder / source.name / "space" / name).rename(folder / name)
        _describe(folder / "README.md", title, bundle)
        if bundle:
            shutil.copytree(bundle.folder, folder / UPLOADED)
    (out / STAMP).unlink()


def _describe(readme: Path, title: str, bundle: Bundle | None) -> None:
    """Write into the card's header what the hub shows: the title, and the models that it is made of."""
    from huggingface_hub import SpaceCard

    card = SpaceCard.load(readme)
    card.data.title = title
    profile = bundle.profile if bundle else None
    origins = [part.origin for part in (profile.language, profile.audio, profile.vision)] if profile else []
    models = [origin.repo for origin in origins if origin and origin.repo]
    card.data.models = models or None
    card.save(readme)
