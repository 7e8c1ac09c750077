"""The stream of training samples: proportions, epochs, reproducibility, and starting anywhere."""

from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmllm_core.config import DataConfig, Recipe, parse_config
from mmllm_core.data import mixture
from mmllm_core.data.mixture import data_hashes, image_paths, training_samples
from mmllm_core.data.sample import Sample
from mmllm_core.errors import ConfigError, DataError
from mmllm_core.vision import file_sha256
from tests.mmllm_core.data.conftest import WriteFile, chat, llava


@pytest.fixture
def files(write: WriteFile) -> dict[str, Path]:
    pictures = [llava(str(i), f"<image>\nQuestion {i}?", f"Answer {i}.", image=f"{i % 4}.png") for i in range(10)]
    texts = [chat(f"Text question {i}?", f"Text answer {i}.") for i in range(7)]
    return {"llava": write(pictures, "pictures.json"), "chat": write(texts, "texts.jsonl")}


def config(files: dict[str, Path], *, streaming: bool = False, weights: tuple[float, float] = (3, 1)) -> DataConfig:
    sources = [
        {"dataset": "llava", "file": str(files["llava"]), "images": "/im", "weight": weights[0]},
        {"dataset": "chat", "file": str(files["chat"]), "weight": weights[1]},
    ]
    return parse_config(DataConfig, {"sources": sources, "streaming": streaming}, "test")


def take(stream: Iterator[Sample], n: int) -> list[Sample]:
    return list(islice(stream, n))


def label(sample: Sample) -> str:
    return sample.id.partition("/")[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_come_in_proportion_to_their_weights(files: dict[str, Path], streaming: bool) -> None:
    counts = Counter(map(label, take(training_samples(config(files, streaming=streaming), 0), 4000)))
    assert counts["pictures"] / 4000 == pytest.approx(0.75, abs=0.03)  # four standard deviations


@pytest.mark.parametrize("streaming", [False, True])
def test_each_source_gives_every_row_once_an_epoch_in_another_order(files: dict[str, Path], streaming: bool) -> None:
    samples = [s for s in take(training_samples(config(files, streaming=streaming), 5), 400) if label(s) == "pictures"]
    epochs = [[s.id for s in samples[at : at + 10]] for at in range(0, 100, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 8


@pytest.mark.parametrize("streaming", [False, True])
def test_the_stream_follows_from_config_and_seed(files: dict[str, Path], streaming: bool) -> None:
    first, again, other = (take(training_samples(config(files, streaming=streaming), seed), 60) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("streaming", [False, True])
@given(start=st.integers(0, 9000), step=st.integers(1, 5))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_that_starts_later_is_the_same_stream(
    files: dict[str, Path], streaming: bool, start: int, step: int
) -> None:
    if streaming:
        start %= 200
    whole = training_samples(config(files, streaming=streaming), 3)
    expected = list(islice(whole, start, start + 12 * step, step))
    assert take(training_samples(config(files, streaming=streaming), 3, count(start, step)), 12) == expected


def test_starting_late_reads_nothing_that_came_before(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    sample = mixture._MappedSource.sample
    monkeypatch.setattr(mixture._MappedSource, "sample", lambda self, i: read.append(i) or sample(self, i))  # type: ignore[func-returns-value]
    take(training_samples(config(files), 3, count(100_000)), 4)
    assert len(read) == 4


def test_workers_shares_make_up_the_stream(files: dict[str, Path]) -> None:
    shares = [take(training_samples(config(files), 0, count(rank, 3)), 5) for rank in range(3)]
    assert [sample for triple in zip(*shares, strict=True) for sample in triple] == take(
        training_samples(config(files), 0), 15
    )


def test_easy_vqa_mixes_with_files(files: dict[str, Path], usual_packages: None) -> None:
    sources: list[dict[str, Any]] = [{"dataset": "easy-vqa"}, {"dataset": "chat", "file": str(files["chat"])}]
    mixed = parse_config(DataConfig, {"sources": sources}, "test")
    samples = take(training_samples(mixed, 0), 50)
    assert set(map(label, samples)) == {"easy-vqa", "texts"}
    assert take(training_samples(mixed, 0, count(20)), 30) == samples[20:]
    assert all(sample.images[0].is_file() for sample in samples if label(sample) == "easy-vqa")
    assert len(list(image_paths(mixed))) == 4000


@pytest.mark.parametrize("streaming", [False, True])
def test_every_image_comes_once(files: dict[str, Path], streaming: bool) -> None:
    assert list(image_paths(config(files, streaming=streaming))) == [Path(f"/im/{i}.png") for i in range(4)]


def test_hashes_name_what_was_learned_from(files: dict[str, Path]) -> None:
    assert data_hashes(config(files)) == {
        "pictures": file_sha256(files["llava"]),
        "texts": file_sha256(files["chat"]),
    }


def test_a_broken_row_ends_the_stream_before_its_first_sample(write: WriteFile) -> None:
    path = write([llava("1", "Hi", "Ho"), llava("2", "Hi")])
    with pytest.raises(DataError, match="row 2"):
        next(training_samples(parse_config(DataConfig, {"sources": [{"dataset": "llava", "file": str(path)}]}, "t"), 0))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_rows_is_refused(write: WriteFile, streaming: bool) -> None:
    values = {"sources": [{"dataset": "llava", "file": str(write([]))}], "streaming": streaming}
    with pytest.raises(DataError, match="holds no rows"):
        next(training_samples(parse_config(DataConfig, values, "test"), 0))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"sources": [{"dataset": "llava", "file": "a.json", "weigth": 2}]}, "weigth"),
        ({"sources": [{"dataset": "llava"}]}, "missing key 'data.sources.0.llava.file'"),
        ({"sources": [{"dataset": "chat", "file": "a.jsonl", "images": "x"}]}, "images"),
        ({"sources": [{"dataset": "coco"}]}, "coco"),
        ({"sources": [{"dataset": "easy-vqa", "weight": 0}]}, "weight"),
        ({"sources": []}, "data.sources"),
        ({"sources": [{"dataset": "easy-vqa"}, {"dataset": "easy-vqa"}]}, "two sources are called 'easy-vqa'"),
        ({"questions_per_image": 3}, "unknown key 'data.questions_per_image'"),
    ],
)
def test_a_mistake_in_the_data_section_is_named(data: dict[str, Any], named: str) -> None:
    values = {"name": "x", "profile": "embedded", "stage": "instruct", "steps": 1, "data": data}
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        parse_config(Recipe, values, "recipe.yaml")


def test_paths_do_not_depend_on_where_a_worker_runs() -> None:
    source = parse_config(DataConfig, {"sources": [{"dataset": "llava", "file": "sets/a.json"}]}, "test").sources[0]
    assert source.model_dump(mode="json")["file"] == str(Path.cwd() / "sets" / "a.json")
    assert source.label == "a"
