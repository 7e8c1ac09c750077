"""Homes of benches that train what another run must not find, or that begin with an empty cache."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmllm_core.models.home import home

MARK = "made-by-a-bench"


@contextmanager
def scratch_home() -> Iterator[Path]:
    """An empty home for a while, but for mmllm's own packages."""
    with tempfile.TemporaryDirectory(prefix="mmllm-bench-") as place:
        kept = home() / "packages"
        kept.mkdir(parents=True, exist_ok=True)
        (Path(place) / kept.name).symlink_to(kept)
        yield Path(place)


def emptied(folder: Path) -> Path:
    """An empty folder that a bench made, or makes now.

    Raises:
        SystemExit: it holds what no bench has made.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise SystemExit(f"{folder}: holds what no bench has made, and would be removed: name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return folder


def mmllm(*arguments: str) -> None:
    """Run an `mmllm` command to its end; what it prints goes to stderr."""
    subprocess.run([sys.executable, "-m", "cluster.cli", *arguments], check=True, stdout=sys.stderr)
