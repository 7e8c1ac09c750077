"""Trackers: what they hold when it is read back by the tracker's own reader."""

from pathlib import Path

import pytest

from mmllm_core.errors import ConfigError, EnvironmentLack
from train_jobs import trackers
from train_jobs.trackers import numbers, open_tracker, require_tracker

CONFIG = {"name": "run", "lora": {"rank": 8, "dropout": None}, "data": {"sources": [{"weight": 2.5}]}}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars of a folder of event files, by name: steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def hparams(folder: Path) -> dict[str, object]:
    """The config that event files hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder))
    events.Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def test_tensorboard_holds_scalars_and_config(tmp_path: Path) -> None:
    with open_tracker("tensorboard", "run", tmp_path, CONFIG) as tracker:
        for step in (1, 2):
            tracker.log({"step": step, "loss": 1 / step, "mfu": None, "accuracy": {"all": 0.5}}, step)
    found = scalars(tmp_path / "tensorboard")
    assert found == {"loss": [(1, 1.0), (2, 0.5)], "accuracy/all": [(1, 0.5), (2, 0.5)]}
    assert hparams(tmp_path / "tensorboard") == {
        "name": "run",
        "lora.rank": 8,
        "lora.dropout": "None",
        "data.sources.0.weight": 2.5,
    }


def test_a_resumed_run_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    for resumed, steps in ((False, (1, 2, 3)), (True, (2, 3, 4))):
        with open_tracker("tensorboard", "run", tmp_path, CONFIG, resumed=resumed) as tracker:
            for step in steps:
                tracker.log({"loss": float(step)}, step)
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # one file of events an attempt


def test_a_run_begun_anew_forgets_the_one_before(tmp_path: Path) -> None:
    for loss in (5.0, 6.0):
        with open_tracker("tensorboard", "run", tmp_path, CONFIG) as tracker:
            tracker.log({"loss": loss}, 1)
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 6.0)]


def test_a_run_resumed_with_another_tracker_gives_it_everything(tmp_path: Path) -> None:
    with open_tracker("none", "run", tmp_path, CONFIG) as tracker:
        tracker.log({"loss": 1.0}, 1)
    with open_tracker("tensorboard", "run", tmp_path, CONFIG, resumed=True) as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 1.0)]


def test_no_tracker_leaves_nothing(tmp_path: Path) -> None:
    with open_tracker("none", "run", tmp_path / "run", CONFIG) as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert list((tmp_path / "run").iterdir()) == []


def test_only_numbers_are_logged_by_flat_names() -> None:
    values = {"step": 3, "loss": 1, "note": "x", "done": True, "mfu": None, "by": {"kind": {"all": 2.0}}}
    assert numbers(values) == {"loss": 1.0, "by/kind/all": 2.0}


def test_an_unknown_tracker_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'comet'.*tensorboard"):
        require_tracker("comet")


def test_a_tracker_whose_package_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentLack, match=r"mmllm\[wandb\]"):
        require_tracker("wandb")
    require_tracker("none")
