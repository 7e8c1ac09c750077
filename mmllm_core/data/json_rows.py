"""The values of a JSON array or of JSON Lines, one after another, however large the file is.

In: a UTF-8 file, with or without a byte order mark, with Unix or Windows newlines. Out: decoded values with their row
numbers. At most one chunk and one row are held in memory. Does not know what a row means.

Bytes that are not UTF-8 do not stop the reading: they arrive as lone surrogates (Python's `surrogateescape`), and
whoever looks at the row can tell which one it is.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmllm_core.errors import DataError

_CHUNK = 1 << 20
ROW_LIMIT = 1 << 24
"""Bytes a row may have. Without a limit a missing bracket would pull the rest of the file into memory."""

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE starts as UTF-16-LE does


@dataclass(frozen=True)
class JsonRow:
    """A value and where it stood."""

    number: int
    """Counted from 1; of JSON Lines the line's number."""
    value: Any
    problem: str | None = None
    """Why a line is not JSON; None if it is."""


def read_rows(path: Path) -> Iterator[JsonRow]:
    """Read a file whose first character tells its kind: `[` opens an array, anything else is JSON Lines.

    A line that is not JSON is given as a `JsonRow` with a `problem`; an array that breaks off or breaks the grammar
    ends the reading, for what follows cannot be told apart.

    Raises:
        DataError: the file cannot be read, is empty, is not UTF-8 text, or its array is not JSON.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(4096)
            if start.startswith(_WIDE_MARKS):
                raise DataError(f"{path}: is UTF-16 or UTF-32 text: save it as UTF-8")
            stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            start = start.removeprefix(codecs.BOM_UTF8).lstrip()
            body = stream.tell()
            while not start:
                if not (chunk := stream.read(_CHUNK)):
                    raise DataError(f"{path}: is empty")
                start = chunk.lstrip()
            stream.seek(body)
            yield from _array(stream, path) if start.startswith(b"[") else _lines(stream)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _lines(stream: IO[bytes]) -> Iterator[JsonRow]:
    for number in itertools.count(1):
        line = stream.readline(ROW_LIMIT)
        if not line:
            return
        if len(line) == ROW_LIMIT and not line.endswith(b"\n"):
            yield JsonRow(number, None, f"the line is longer than {ROW_LIMIT >> 20} MiB")
            while line and not line.endswith(b"\n"):
                line = stream.readline(ROW_LIMIT)
        elif text := line.decode("utf-8", "surrogateescape").strip():
            try:
                yield JsonRow(number, json.loads(text))
            except (ValueError, RecursionError) as error:
                yield JsonRow(number, None, f"the line is not JSON: {_reason(error)}")


def _array(stream: IO[bytes], path: Path) -> Iterator[JsonRow]:
    window = _Window(stream, path)
    window.take("[")
    if window.peek() == "]":
        window.end()
        return
    for number in itertools.count(1):
        yield JsonRow(number, window.value(number))
        if window.peek() == "]":
            window.end()
            return
        window.take(",", f"row {number}: a comma or a closing bracket must follow")


class _Window:
    """A sliding piece of a text file, long enough for the value at its start."""

    def __init__(self, stream: IO[bytes], path: Path):
        self._stream = stream
        self._path = path
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text = ""
        self._at = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is not space; empty at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._fill()

    def take(self, character: str, otherwise: str = "is not a JSON array") -> None:
        if self.peek() != character:
            raise DataError(f"{self._path}: {otherwise}" + (": the file breaks off" if self._ended else ""))
        self._at += 1

    def end(self) -> None:
        """Take the closing bracket, after which nothing may follow."""
        self.take("]")
        if self.peek():
            raise DataError(f"{self._path}: something follows the array's closing bracket: are these two files in one?")

    def value(self, number: int) -> Any:
        """Decode the value that comes next, reading on until it is whole."""
        self.peek()
        while True:
            problem: Exception | None = None
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # a number may go on in the next chunk
                    self._at = end
                    return value
            except (ValueError, RecursionError) as error:
                problem = error
            if self._ended or len(self._text) - self._at > ROW_LIMIT:
                raise DataError(f"{self._path}: row {number}: is not JSON: {_reason(problem)}") from problem
            self._fill()

    def _fill(self) -> None:
        chunk = self._stream.read(_CHUNK)
        self._ended = not chunk
        self._text = self._text[self._at :] + self._decode(chunk, final=self._ended)
        self._at = 0


def _reason(error: Exception | None) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (after {error.colno - 1} characters)"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
