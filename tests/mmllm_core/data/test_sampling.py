"""Which worker takes what: nothing twice, nothing left out, the same steps however many workers there are."""

import json
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmllm_core.config import BatchingConfig, DataConfig, parse_config
from mmllm_core.data.mixture import training_samples
from mmllm_core.data.sampling import n_characters, worker_samples

Grouping = Literal["none", "length", "modality"]
N_ROWS = 37


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """37 text rows of many lengths, each with its own id."""
    file = tmp_path / "texts.jsonl"
    rows = [
        [{"role": "user", "content": "word " * (1 + 7 * i % 23)}, {"role": "assistant", "content": f"row {i}"}]
        for i in range(N_ROWS)
    ]
    file.write_text("".join(json.dumps({"id": f"row {i}", "messages": row}) + "\n" for i, row in enumerate(rows)))
    return parse_config(DataConfig, {"sources": [{"dataset": "chat", "file": str(file)}]}, "test")


def shares(data: DataConfig, grouping: Grouping, world: int, steps: int, **changes: Any) -> list[list[list[str]]]:
    """Ids by worker and step."""
    batching = BatchingConfig(grouping=grouping, window=3)
    settings = {"batch_size": 8, "seed": 5} | changes
    return [
        [
            [sample.id for sample in step]
            for step in islice(worker_samples(data, batching, rank=rank, world=world, **settings), steps)
        ]
        for rank in range(world)
    ]


def by_step(of_workers: list[list[list[str]]]) -> list[list[str]]:
    return [sorted(id for worker in step for id in worker) for step in zip(*of_workers, strict=True)]


@pytest.mark.parametrize("grouping", ["none", "length", "modality"])
@given(world=st.integers(1, 8), start=st.integers(0, 9))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_steps_are_the_same_for_any_number_of_workers_and_any_start(
    data: DataConfig, grouping: Grouping, world: int, start: int
) -> None:
    alone = by_step(shares(data, grouping, 1, start + 4))
    assert by_step(shares(data, grouping, world, 4, start_step=start)) == alone[start:]


@pytest.mark.parametrize("grouping", ["none", "length"])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_an_epoch_over_uneven_shares_gives_every_row_once(data: DataConfig, grouping: Grouping, world: int) -> None:
    """37 rows in steps of 37, over workers that it does not divide by."""
    of_workers = shares(data, grouping, world, 3, batch_size=N_ROWS)
    rows = sorted(sample.id for sample in islice(training_samples(data, 5), N_ROWS))
    assert len(set(rows)) == N_ROWS
    if grouping == "none":
        assert by_step(of_workers) == [rows] * 3
    assert sorted(id for step in by_step(of_workers) for id in step) == sorted(rows * 3)  # three steps are a window
    sizes = [len(worker[0]) for worker in of_workers]
    assert max(sizes) - min(sizes) <= 1


def test_many_small_steps_also_make_up_epochs(data: DataConfig) -> None:
    of_workers = shares(data, "none", 3, N_ROWS)  # 8 epochs in 37 steps of 8
    counts = [sum(step.count(id) for step in by_step(of_workers)) for id in by_step(of_workers)[0]]
    assert counts == [8] * 8


def test_samples_of_like_length_share_a_step(data: DataConfig) -> None:
    def spread(grouping: Grouping) -> int:
        steps = worker_samples(data, BatchingConfig(grouping=grouping, window=4), batch_size=8, seed=0)
        lengths = [[n_characters(sample) for sample in step] for step in islice(steps, 8)]
        return sum(max(step) - min(step) for step in lengths)

    assert spread("length") < spread("none") / 2
