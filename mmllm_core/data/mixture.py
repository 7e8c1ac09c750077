"""Sources with weights -> one endless, reproducible stream of training samples.

In: a `DataConfig` and a seed. Out: `Sample`s; besides, every image once, and hashes of what was learned from. Does not
know tokens, features or workers, except that a worker may ask for some positions alone.

Which source position k comes from is drawn with the probabilities of the weights, as
`datasets.interleave_datasets(probabilities=...)` does, but blockwise from the seed: how many samples each source gave
before position k is counted without reading one, and a memory-mapped source then opens at its own position at once. No
source is ever exhausted: it starts its next epoch, newly shuffled, while the others go on with theirs. A source of n
rows has given each row once after n of its samples.
"""

from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmllm_core.config import ChatData, DataConfig, DataSource, EasyVqaData, LlavaData
from mmllm_core.data import easy_vqa
from mmllm_core.data.conversation_file import content_sha256, memory_mapped, streamed
from mmllm_core.data.rows import row_features, sample_of
from mmllm_core.data.sample import Sample
from mmllm_core.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_BLOCK = 4096
"""Positions whose sources are drawn at once."""
_SHUFFLE_BUFFER = 10_000
"""Rows among which a streamed file is shuffled: about 20 MB of LLaVA-Instruct."""


def training_samples(config: DataConfig, seed: int, positions: Iterable[int] | None = None) -> Iterator[Sample]:
    """An endless stream, equal for equal config, files and seed.

    Args:
        positions: which samples of the stream are wanted, rising; all of them if not given. Memory-mapped sources
            skip the others without reading; easy-VQA and streamed files replay, at about 0.3 ms a sample.

    Raises:
        DataError: a file cannot be read, or a row of it cannot be learned from.
        WeightsError: easy-VQA cannot be fetched.
    """
    sources = [_open(source, config.streaming, seed, i) for i, source in enumerate(config.sources)]
    weights = np.array([source.weight for source in config.sources], dtype=np.float64)
    for source, index in _placed(weights, abs(seed), count() if positions is None else positions):
        yield sources[source].sample(index)


def image_paths(config: DataConfig) -> Iterator[Path]:
    """Every training image once, in order of appearance."""
    for source in config.sources:
        if isinstance(source, EasyVqaData):
            yield from (image.image for image in easy_vqa.load_split(easy_vqa.fetch(), "train"))
        elif isinstance(source, LlavaData):
            names = _streamed_images(source) if config.streaming else _mapped_images(source)
            yield from (source.images_folder / name for name in names)


def data_hashes(config: DataConfig) -> dict[str, str]:
    """sha256 of each source's file (of easy-VQA: its package), by label. Images are no part of it.

    Raises:
        DataError: a file cannot be read.
    """
    return {
        source.label: easy_vqa.SOURCE.sha256 if isinstance(source, EasyVqaData) else content_sha256(source.file)
        for source in config.sources
    }


class _Source(Protocol):
    def sample(self, index: int) -> Sample:
        """The source's sample at `index`, counted over all epochs; asked for in rising order."""
        ...


def _open(source: DataSource, streaming: bool, seed: int, i: int) -> _Source:
    if isinstance(source, EasyVqaData):
        return _StreamedSource(source, _easy_vqa_rows(source, seed))
    seeds = [abs(seed), i]  # as Python's random takes a negative seed
    if streaming:
        return _StreamedSource(source, _epochs(streamed(source.file, source.dataset), source.file, seeds))
    return _MappedSource(source, memory_mapped(source.file, source.dataset), seeds)


class _MappedSource:
    """Rows by number; each epoch has its own permutation."""

    def __init__(self, source: LlavaData | ChatData, dataset: "Dataset", seed: list[int]):
        self._source = source
        self._dataset = dataset
        self._seed = seed
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def sample(self, index: int) -> Sample:
        epoch, at = divmod(index, len(self._dataset))
        if epoch != self._epoch:
            self._order = np.random.default_rng([*self._seed, epoch]).permutation(len(self._dataset))
            self._epoch = epoch
        return sample_of(self._dataset[int(self._order[at])], source=self._source.label, images=_images(self._source))


class _StreamedSource:
    """Rows in the order in which they come; what lies before the index asked for is read and dropped."""

    def __init__(self, source: DataSource, rows: Iterator[dict[str, Any]]):
        self._source = source
        self._rows = rows
        self._next = 0

    def sample(self, index: int) -> Sample:
        row = next(islice(self._rows, index - self._next, None))
        self._next = index + 1
        return sample_of(row, source=self._source.label, images=_images(self._source))


def _images(source: DataSource) -> Path | None:
    return source.images_folder if isinstance(source, LlavaData) else None


def _easy_vqa_rows(source: EasyVqaData, seed: int) -> Iterator[dict[str, Any]]:
    from datasets import IterableDataset

    arguments = {"folder": easy_vqa.fetch(), "data": source, "seed": seed}
    endless = IterableDataset.from_generator(easy_vqa.training_rows, features=row_features(), gen_kwargs=arguments)
    return iter(endless)


def _epochs(dataset: "IterableDataset", file: Path, seed: list[int]) -> Iterator[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    shuffled = dataset.shuffle(seed=int(generator.integers(1 << 62)), buffer_size=_SHUFFLE_BUFFER)
    for epoch in count():
        shuffled.set_epoch(epoch)  # another order each epoch
        n_rows = 0
        for row in shuffled:
            n_rows += 1
            yield row
        if not n_rows:
            raise DataError(f"{file}: holds no rows")


def _placed(weights: NDArray[np.float64], seed: int, positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """For each position: which source it comes from, and how many samples that source gave before."""
    given = np.zeros(len(weights), dtype=np.int64)
    drawn = _draw(weights, seed, 0)
    at = 0
    for position in positions:
        while at // _BLOCK < position // _BLOCK:
            given += np.bincount(drawn[at % _BLOCK :], minlength=len(weights))
            at = (at // _BLOCK + 1) * _BLOCK
            drawn = _draw(weights, seed, at // _BLOCK)
        given += np.bincount(drawn[at % _BLOCK : position % _BLOCK], minlength=len(weights))
        at = position
        source = int(drawn[position % _BLOCK])
        yield source, int(given[source])


def _draw(weights: NDArray[np.float64], seed: int, block: int) -> NDArray[np.int64]:
    """The sources of a block's positions, int64 (_BLOCK,)."""
    bounds = np.cumsum(weights / weights.sum())
    drawn = np.searchsorted(bounds, np.random.default_rng([seed, block]).random(_BLOCK), side="right")
    return np.minimum(drawn, len(weights) - 1)  # rounding may leave the last bound just below 1


def _mapped_images(source: LlavaData) -> Iterator[str]:
    import pyarrow.compute as pc

    column = memory_mapped(source.file, source.dataset).data.column("images")
    for name in pc.unique(pc.list_flatten(column)):  # stays in Arrow: no Python string a row
        yield name.as_py()


def _streamed_images(source: LlavaData) -> Iterator[str]:
    seen: set[str] = set()
    for row in streamed(source.file, source.dataset):
        for name in row["images"]:
            if name not in seen:
                seen.add(name)
                yield name
