"""A file of conversations -> Arrow rows: memory-mapped from a copy that is made once, or streamed as they are read.

In: a JSON array or JSON Lines in one of `FORMATS`. Out: a `datasets.Dataset` or `datasets.IterableDataset` of `Row`s in
the file's order. The copy lies under the home folder and is keyed by the file's content, so a file that was moved or
renamed is not converted again. Does not know mixtures, epochs or shuffling.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmllm_core.artifact import build_once, is_built, require_free_disk
from mmllm_core.data.json_rows import read_rows
from mmllm_core.data.llava import is_llava, llava_faults, llava_record
from mmllm_core.data.record import Fault, MalformedRow, Record, prevents_loading, record_faults, record_row
from mmllm_core.data.rows import Row, row_features
from mmllm_core.data.text import chat_record, is_chat
from mmllm_core.errors import DataError
from mmllm_core.models.home import home
from mmllm_core.vision import file_sha256

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_CONVERSION = 1
"""Raise it when rows are made otherwise, so that older copies are made anew."""
_BATCH = 1000

FormatName = Literal["llava", "chat"]


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a file are told, read and judged."""

    matches: Callable[[Any], bool]
    read: Callable[[Any], Record]
    faults: Callable[[Record], Iterator[Fault]]


FORMATS: dict[FormatName, RowFormat] = {
    "llava": RowFormat(is_llava, llava_record, llava_faults),
    "chat": RowFormat(is_chat, chat_record, record_faults),
}


def tell_format(path: Path) -> FormatName:
    """Which format a file is in, by the first row that fits one.

    Raises:
        DataError: the file cannot be read, or none of its first rows is of a known format.
    """
    row = None
    for row in islice(read_rows(path), _BATCH):
        for name, row_format in FORMATS.items():
            if row_format.matches(row.value):
                return name
    if row is None:
        raise DataError(f"{path}: holds no rows")
    raise DataError(f"{path}: its rows have neither 'conversations' (LLaVA's format) nor 'messages' (the chat format)")


def file_rows(path: Path, format_name: FormatName) -> Iterator[Row]:
    """The rows of a file, in order.

    Raises:
        DataError: a row that cannot be learned from; the message names file, row and fault.
    """
    row_format = FORMATS[format_name]
    for row in read_rows(path):
        if row.problem is not None:
            raise _refusal(path, row.number, row.problem)
        try:
            record = row_format.read(row.value)
        except MalformedRow as error:
            raise _refusal(path, row.number, str(error)) from error
        for fault in row_format.faults(record):
            if prevents_loading(fault):
                raise _refusal(path, row.number, f"{fault.kind}: {fault.detail}")
        yield record_row(record, row.number)


def memory_mapped(path: Path, format_name: FormatName) -> "Dataset":
    """The rows of a file as a memory-mapped table: converted once, then opened without being read.

    Raises:
        DataError: as `file_rows`, or a file without rows.
        EnvironmentLack: no space for the copy, which is about as large as the file.
    """
    from datasets import Dataset

    digest = content_sha256(path)
    inputs = {"sha256": digest, "format": format_name, "conversion": _CONVERSION}
    folder = home() / "data" / "rows" / f"{format_name}-{digest[:16]}"
    if not is_built(folder, inputs):
        require_free_disk(folder, 1.5 * path.stat().st_size / 1e9, f"converting {path.name}")
        build_once(folder, inputs, lambda scratch: _write_arrow(file_rows(path, format_name), scratch / "rows.arrow"))
    dataset = Dataset.from_file(str(folder / "rows.arrow"))
    if not len(dataset):
        raise DataError(f"{path}: holds no rows")
    return dataset


def streamed(path: Path, format_name: FormatName) -> "IterableDataset":
    """The rows of a file as they are read: no copy, no waiting, and no row by its number.

    Raises:
        DataError: when it is iterated, as `file_rows`.
    """
    from datasets import IterableDataset

    arguments = {"path": path, "format_name": format_name}
    return IterableDataset.from_generator(file_rows, features=row_features(), gen_kwargs=arguments)


def content_sha256(path: Path) -> str:
    """sha256 of a training file, hex.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _write_arrow(rows: Iterator[Row], target: Path) -> None:
    import pyarrow as pa

    schema = row_features().arrow_schema
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(rows, _BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def _refusal(path: Path, number: int, reason: str) -> DataError:
    return DataError(
        f"{path}: row {number}: {reason}: mend or remove it ('mmllm data lint' counts such rows and names the first)"
    )
