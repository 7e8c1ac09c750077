"""Folders that are either whole or absent: built aside, stamped with what they were made from, renamed.

Knows nothing of what a folder holds. A stamp (`artifact.json`) lets a second run reuse a folder that was
made from equal inputs and rebuild one that was not.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmllm_core.errors import EnvironmentLack

STAMP = "artifact.json"


def is_built(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether `folder` is whole and was made from exactly these JSON-serialisable inputs."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same: bool = stamp == json.loads(json.dumps(inputs))
    return same


@contextmanager
def building(folder: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """Give a scratch folder that becomes `folder`, stamped, if the block succeeds and vanishes if it does not.

    Raises:
        EnvironmentLack: the disk is full or the place cannot be written.
    """
    scratch: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield scratch
        (scratch / STAMP).write_text(json.dumps(inputs, indent=2, sort_keys=True), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise _unwritable(folder, error) from error
    finally:
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch, ignore_errors=True)


def build_once(folder: Path, inputs: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Let `build` fill a folder as `building` gives it, unless it is built; of processes that come together one builds.

    Raises:
        EnvironmentLack: as `building`.
    """
    from filelock import FileLock

    if is_built(folder, inputs):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        turn = FileLock(folder.with_name(f"{folder.name}.lock")).acquire()
    except OSError as error:
        raise _unwritable(folder, error) from error
    with turn:
        if not is_built(folder, inputs):
            with building(folder, inputs) as scratch:
                build(scratch)


def _unwritable(folder: Path, error: OSError) -> EnvironmentLack:
    return EnvironmentLack(f"{folder}: cannot be written ({error.strerror or error}): free space or set MMLLM_HOME")


def require_free_disk(place: Path, gigabytes: float, what: str) -> None:
    """Refuse to start work that would fill the disk.

    Raises:
        EnvironmentLack: less than `gigabytes` (1e9 bytes) are free where `place` lies or would lie.
    """
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < gigabytes:
        raise EnvironmentLack(
            f"{existing}: {free:.1f} GB free and {what} needs {gigabytes:g} GB: free space or set MMLLM_HOME"
        )
