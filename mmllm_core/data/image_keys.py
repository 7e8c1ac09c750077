"""Which pixels an image file holds, remembered: a file is decoded once and not whenever it is drawn.

In: paths of image files. Out: their pixel hashes (`mmllm_core.vision.pixel_hash`). A hash is remembered for the file's
path, size and time of change to the nanosecond, in a SQLite file that processes share and that outlives them. Where
that file cannot be used the memory is this process's own. Does not know encoders or features.
"""

import logging
import os
import sqlite3
import threading
from pathlib import Path

from PIL import Image

from mmllm_core.errors import ImageError
from mmllm_core.vision import decode_image, pixel_hash

_log = logging.getLogger(__name__)
_TABLE = "pixels_1"
"""To be counted up when `decode_image` or `pixel_hash` gives something else for the same file."""


class ImageKeys:
    """Pixel hashes of image files.

    Args:
        memory: the SQLite file; made when it does not exist.
        max_pixels: as in `decode_image`.
    """

    def __init__(self, memory: Path, max_pixels: int):
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            self._database = _open(str(memory))
        except (OSError, sqlite3.Error) as error:
            self._database = self._own_memory(error)

    def pixel_hash(self, path: Path) -> str:
        """Pixel hash of a file, which is decoded only if it is new or was changed.

        Raises:
            ImageError: the file cannot be read or is not a usable image; the message names it.
        """
        return self.remembered(path) or self.decode(path)[0]

    def remembered(self, path: Path) -> str | None:
        """Pixel hash of a file that was decoded before and has not changed since, or None."""
        try:
            status = path.stat()
        except (OSError, ValueError):  # a name that no file can have
            return None
        query = f"SELECT pixels FROM {_TABLE} WHERE path = ? AND size = ? AND mtime_ns = ?"
        found = self._execute(query, (os.path.abspath(path), status.st_size, status.st_mtime_ns))
        return str(found[0]) if found else None

    def decode(self, path: Path) -> tuple[str, Image.Image]:
        """Decode a file and remember its pixel hash.

        Raises:
            ImageError: the file cannot be read or is not a usable image; the message names it.
        """
        try:
            with path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                data = stream.read()
            image = decode_image(data, self._max_pixels)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error
        except (OSError, ValueError) as error:
            raise ImageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        pixels = pixel_hash(image)
        row = (os.path.abspath(path), status.st_size, status.st_mtime_ns, pixels)
        self._execute(f"INSERT OR REPLACE INTO {_TABLE} VALUES (?, ?, ?, ?)", row)
        return pixels, image

    def _execute(self, statement: str, values: tuple[str | int, ...]) -> tuple[str] | None:
        with self._lock:
            try:
                row: tuple[str] | None = self._database.execute(statement, values).fetchone()
            except sqlite3.Error as error:
                self._database = self._own_memory(error)
                row = self._database.execute(statement, values).fetchone()
            return row

    def _own_memory(self, error: Exception) -> sqlite3.Connection:
        _log.warning("image files are remembered by this process alone: %s", error)
        return _open(":memory:")


def _open(name: str) -> sqlite3.Connection:
    database = sqlite3.connect(name, timeout=10, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute(
        f"CREATE TABLE IF NOT EXISTS {_TABLE} "
        "(path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, pixels TEXT) WITHOUT ROWID"
    )
    return database
