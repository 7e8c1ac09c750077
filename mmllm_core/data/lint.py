"""What is wrong with a file of conversations: every fault counted, with the first places where it shows.

In: a file in one of `conversation_file.FORMATS`, its image folder, and a `Rendering` if lengths matter. Out: a
`LintReport`. Rows are read one after another and forgotten; what is kept is a hash a row and a hash an image name. Does
not know how a report is printed.

This process reads, and decides all that a row tells by itself. What takes longer goes in batches to worker processes:
opening images, each once, and tokenizing the rows whose length their bytes do not settle.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm_core.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID, Rendered, render
from mmllm_core.data.batch_checks import BatchChecks, worker_processes
from mmllm_core.data.conversation_file import FORMATS, FormatName, tell_format
from mmllm_core.data.image_file import image_fault
from mmllm_core.data.json_rows import read_rows
from mmllm_core.data.record import (
    Fault,
    FaultKind,
    MalformedRow,
    Record,
    messages_of,
    prevents_loading,
)
from mmllm_core.data.token_count import Rendering, counter
from mmllm_core.errors import ConversationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 3
"""Places that a report names for each kind of fault."""
_TELL_EVERY = 1000


@dataclass(frozen=True)
class LintOptions:
    """What is checked and by how many."""

    images: Path
    """Folder that image names start from."""
    rendering: Rendering | None = None
    """None leaves lengths unchecked."""
    decode: bool = False
    """Decode every image in full instead of looking at its header and its end."""
    max_pixels: int = 40_000_000
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)


@dataclass(frozen=True)
class Example:
    """A place where a fault shows."""

    row: int
    id: str
    detail: str


@dataclass
class Finding:
    """One kind of fault: how often, and where first."""

    kind: FaultKind
    count: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, row: int, id: str, detail: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(Example(row, id, detail))


@dataclass
class LintReport:
    """What was looked at, and what was found."""

    format_name: FormatName
    rows: int = 0
    images: int = 0
    """Distinct image names."""
    findings: dict[FaultKind, Finding] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def add(self, fault: Fault, row: int, id: str) -> None:
        """Count a fault. Those of one kind must come in the order of their rows."""
        self.findings.setdefault(fault.kind, Finding(fault.kind)).add(row, id, fault.detail)


def lint(path: Path, options: LintOptions, on_rows: Callable[[int], None] = lambda rows: None) -> LintReport:
    """Check a file.

    Missing and broken images are counted once a file, at the first row that names it; all else once a row, a turn's
    fault once a turn.

    Args:
        on_rows: told now and then how many rows were read.

    Raises:
        DataError: the file cannot be read, is of no known format, or is an array that is not JSON.
    """
    report = LintReport(tell_format(path))
    row_format = FORMATS[report.format_name]
    bound = counter(options.rendering) if options.rendering else None
    first_with: dict[int, int] = {}
    names: set[int] = set()
    with worker_processes(options.workers) as pool:
        images = BatchChecks(pool, partial(_image_faults, options=options), report.add)
        lengths = BatchChecks(pool, partial(_length_faults, options=options), report.add)
        for row in read_rows(path):
            report.rows += 1
            if report.rows % _TELL_EVERY == 0:
                on_rows(report.rows)
            if row.problem is not None:
                report.add(Fault(FaultKind.NOT_JSON, row.problem), row.number, "")
                continue
            try:
                record = row_format.read(row.value)
            except MalformedRow as error:
                report.add(Fault(FaultKind.MALFORMED, str(error)), row.number, "")
                continue
            faults = list(row_format.faults(record))
            loads = not any(prevents_loading(fault) for fault in faults)
            if (first := first_with.setdefault(_hash(_content(record)), row.number)) != row.number:
                faults.append(Fault(FaultKind.DUPLICATE, f"the same images and turns as row {first}"))
            for name in record.images:
                if (key := _hash([name])) not in names:
                    names.add(key)
                    images.put(row.number, record.id, name)
            if bound and loads and not bound.surely_fits(record):
                lengths.put(row.number, record.id, record)
            for fault in faults:
                report.add(fault, row.number, record.id)
        images.finish()
        lengths.finish()
    report.images = len(names)
    on_rows(report.rows)
    return report


def rendered_samples(
    path: Path, tokenizer: "PreTrainedTokenizerBase", rendering: Rendering
) -> Iterator[tuple[int, str, Rendered]]:
    """The rows that can be learned from, as `(row number, id, rendered)`; rows with faults and long ones are left out.

    Raises:
        DataError: as `lint`.
    """
    row_format = FORMATS[tell_format(path)]
    for row in read_rows(path):
        try:
            record = row_format.read(row.value)
            if not any(prevents_loading(fault) for fault in row_format.faults(record)):
                yield (
                    row.number,
                    record.id,
                    render(
                        messages_of(record),
                        tokenizer,
                        n_image_tokens=rendering.n_image_tokens,
                        max_length=rendering.max_length,
                        generation_prompt=False,
                    ),
                )
        except (MalformedRow, ConversationError):
            continue


def shown_pieces(rendered: Rendered, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, bool]]:
    """A rendered conversation as pieces of text, each with whether its tokens are supervised.

    A run of image tokens is one piece, `<image x 576>`.
    """
    tokens = zip(rendered.input_ids, rendered.labels, strict=True)
    runs = groupby(tokens, lambda token: (token[0] == IMAGE_TOKEN_ID, token[1] != IGNORE_INDEX))
    for (is_image, supervised), run in runs:
        ids = [token for token, _ in run]
        yield (f"<image x {len(ids)}>" if is_image else str(tokenizer.decode(ids)), supervised)


def _image_faults(names: list[str], options: LintOptions) -> list[Fault | None]:
    return [image_fault(options.images / n, max_pixels=options.max_pixels, decode=options.decode) for n in names]


def _length_faults(records: list[Record], options: LintOptions) -> list[Fault | None]:
    assert options.rendering is not None
    return counter(options.rendering).faults(records)


def _content(record: Record) -> Iterator[str]:
    yield from record.images
    for turn in record.turns:
        yield turn.role
        yield turn.text


def _hash(texts: Iterable[str]) -> int:
    """64 bits: among a million rows, two differing ones are taken for equal with a chance of 1 in 40 million."""
    return int.from_bytes(blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
