"""The metrics log of a run, and what follows it while it grows."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from train_jobs import progress
from train_jobs.progress import MetricsLog, MetricsReader, following, read_metrics, step_lines, step_note
from train_jobs.trackers import open_tracker


def test_a_half_written_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    MetricsLog(path).write(step=1, loss=2.0)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": 2})[:5])
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_what_follows_a_line_that_was_broken_off_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write(step=1, loss=2.0)
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 2, "lo')
    MetricsLog(path).write(event="resumed", step=1)
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"event": "resumed", "step": 1}]


def test_a_reader_gives_each_line_once_and_starts_over_with_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    assert reader.new_lines() == []
    log = MetricsLog(path)
    log.write(step=1)
    log.write(step=2)
    assert reader.new_lines() == [{"step": 1}, {"step": 2}]
    log.write(step=3)
    assert reader.new_lines() == [{"step": 3}]
    path.unlink()
    log.write(step=1)
    assert reader.new_lines() == [{"step": 1}]


def test_steps_that_a_resumed_run_went_back_over_count_once() -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)]
    lines += [{"event": "resumed", "step": 2}, {"phase": "loading"}, {"step": 3, "loss": 0.5}]
    assert [(line["step"], line["loss"]) for line in step_lines(lines)] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_the_bar_says_what_was_measured_and_nothing_else() -> None:
    whole = {
        "loss": 2.0,
        "loss_ema": 1.5,
        "tokens_per_second": 1234.5,
        "samples_per_second": 3.14159,
        "mfu": 0.314,
        "memory_gb": 2.06,
    }
    assert step_note(whole) == "loss 1.500  1,234 tok/s  3.14 conv/s  31% MFU  2.1 GB"
    assert step_note({"loss": 2.0, "mfu": None}) == "loss 2.000"


def test_a_follower_gives_the_tracker_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(step=1, loss=3.0)  # from before a restart
    told = _Told()
    with following(path, 3, "training", told):  # type: ignore[arg-type]
        log.write(phase="loading")
        log.write(step=2, loss=2.0)
        log.write(event="checkpoint", step=2)
        log.write(step=3, loss=1.0)
    assert told.steps == [1, 2, 3]


def test_a_tracker_that_fails_ends_neither_the_run_nor_the_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    monkeypatch.setattr(progress, "console", Console(width=200))
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    told = _Told(fails_at=2)
    with following(path, 3, "training", told):  # type: ignore[arg-type]
        for step in (1, 2, 3):
            log.write(step=step, loss=1.0)
    assert told.steps == [1]
    said = capsys.readouterr().out
    assert "failed at step 2" in said
    assert "no connection" in said


class _Told:
    """A tracker whose server may go away."""

    def __init__(self, fails_at: int | None = None):
        self.steps: list[int] = []
        self._fails_at = fails_at

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self._fails_at:
            raise ConnectionError("no connection")
        self.steps.append(step)


@contextmanager
def _tensorboard(folder: Path, resumed: bool) -> Iterator[Any]:
    with open_tracker("tensorboard", "run", folder, {}, resumed=resumed) as tracker:
        yield tracker


def test_a_log_that_is_followed_again_after_a_restart_repeats_no_step(tmp_path: Path) -> None:
    from tests.train_jobs.test_trackers import scalars

    path = tmp_path / "metrics.jsonl"
    for resumed, steps in ((False, (1, 2, 3)), (True, (3, 4))):  # step 3 is done again
        with _tensorboard(tmp_path, resumed) as tracker, following(path, 4, "training", tracker):
            log = MetricsLog(path)
            for step in steps:
                log.write(step=step, loss=float(step))
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
