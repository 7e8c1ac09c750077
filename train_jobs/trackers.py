"""Experiment trackers behind one key: `tracker: tensorboard | wandb | mlflow | trackio | none`.

In: the scalars of a run's metrics log, step by step, and its config. Out: a run in the tracker, whose files lie in the
run's folder unless the tracker's own environment variables name a server. Does not know recipes, Ray or models.

Trackers live in the driver, and the thread that follows the metrics log feeds them. `accelerate.tracking` wraps the
same four, but every call of it asks `PartialState`, which joins a process group as soon as the environment speaks of
one, and its MLflow run belongs to the thread that opened it.

What is open is written down in `tracker.json` (kind, the tracker's own id of the run, last step given), so that a
resumed run goes on in the same place and gives no step twice.
"""

import importlib.util
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from mmllm_core.config import Tracker as TrackerKind
from mmllm_core.errors import ConfigError, EnvironmentLack, first_line

PROJECT = "mmllm"
"""What runs are gathered under, where a tracker gathers them."""
_STATE = "tracker.json"


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker is to know it."""

    name: str
    folder: Path
    """<home>/runs/NAME; the tracker gets a folder of its own kind's name in it."""
    id: str
    """The tracker's own id of the run."""
    config: dict[str, Any]
    resumed: bool
    next_step: int
    """First step that was not given yet."""


class _Backend(Protocol):
    """One tracker's own client."""

    @property
    def id(self) -> str: ...

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class Tracker:
    """An open tracker; gives each step once."""

    def __init__(self, backend: _Backend | None, state: Path, kind: TrackerKind, last_step: int):
        self._backend = backend
        self._state = state
        self._kind = kind
        self._last_step = last_step

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Give the numbers among `values`; a step that is not after the last one given is passed over.

        Args:
            values: by name; mappings in it become `outer/inner`, what is no number is left out.
            step: counted from 1, over all attempts of a run.
        """
        if self._backend is None or step <= self._last_step:
            return
        self._backend.log(numbers(values), step)
        self._last_step = step
        self._remember()

    def _remember(self) -> None:
        if self._backend is None:
            return
        values = {"kind": self._kind, "id": self._backend.id, "last_step": self._last_step}
        scratch = self._state.with_suffix(".part")
        scratch.write_text(json.dumps(values), encoding="utf-8")
        scratch.replace(self._state)


@contextmanager
def open_tracker(
    kind: TrackerKind, run_name: str, folder: Path, config: Mapping[str, Any], *, resumed: bool = False
) -> Iterator[Tracker]:
    """Open a tracker while the block runs; an exception in the block marks the run as failed, where trackers can.

    Args:
        run_name: what the run is called there.
        folder: the run's own, <home>/runs/NAME.
        config: recorded with the run; nested mappings become `outer.inner`.
        resumed: go on with what an earlier attempt opened in `folder`; otherwise a run is begun anew.

    Raises:
        EnvironmentLack: the tracker's package is missing.
    """
    require_tracker(kind)
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / _STATE
    before = _read_state(state, kind) if resumed else None
    if kind == "none":
        state.unlink(missing_ok=True)
        yield Tracker(None, state, kind, 0)
        return
    last_step = before["last_step"] if before else 0
    run = TrackedRun(
        name=run_name,
        folder=folder / kind,
        id=before["id"] if before else uuid.uuid4().hex[:12],
        config=dict(_flat(config, ".")),
        resumed=before is not None,
        next_step=last_step + 1,
    )
    if not run.resumed and kind == "tensorboard":
        shutil.rmtree(run.folder, ignore_errors=True)  # it shows all event files of a folder as one run
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        backend = _BACKENDS[kind](run)
    except Exception as error:  # whatever a client of another's making raises
        raise EnvironmentLack(
            f"tracker: {kind} cannot be opened: {first_line(error)}: mend that, or set 'tracker: none'"
        ) from error
    tracker = Tracker(backend, state, kind, last_step)
    tracker._remember()
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        try:
            backend.close(failed)
        except Exception as error:  # the run has ended by now, however it did
            logging.getLogger(__name__).warning("tracker %s: not closed: %s", kind, error)


def require_tracker(kind: str) -> None:
    """Make sure that a tracker can be opened, before anything else is loaded.

    Raises:
        ConfigError: no such tracker.
        EnvironmentLack: its package is missing; the message names the extra that brings it.
    """
    if kind not in get_args(TrackerKind):
        raise ConfigError(f"tracker: '{kind}' is unknown: choose one of {', '.join(get_args(TrackerKind))}")
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise EnvironmentLack(f"tracker: {kind} is not installed: pip install 'mmllm[{kind}]', or set 'tracker: none'")


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a mapping, nested names joined by `/`; a truth value is none, nor is `step`."""
    return {
        name: float(value)
        for name, value in _flat(values, "/")
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


def _flat(values: Mapping[str, Any], joint: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, joint, f"{name}{joint}")
        elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
            yield from _flat({str(i): part for i, part in enumerate(value)}, joint, f"{name}{joint}")
        else:
            yield name, value


def _read_state(path: Path, kind: TrackerKind) -> dict[str, Any] | None:
    """What an earlier attempt wrote down; None if there was none, or it used another tracker."""
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return values if values["kind"] == kind else None


class _TensorBoard:
    """Event files in <folder>; `tensorboard --logdir <home>/runs` shows all runs."""

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.id = run.id
        # What a broken attempt gave after the last step written down is dropped when files are read.
        self._writer = SummaryWriter(str(run.folder), purge_step=run.next_step if run.resumed else None)
        if not run.resumed:
            config = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in run.config.items()}
            for summary in hparams(config, {}):
                self._writer._get_file_writer().add_summary(summary)  # `add_hparams` would open a second run
            self._writer.flush()

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases; `WANDB_MODE=offline` keeps it in the folder."""

    def __init__(self, run: TrackedRun):
        import wandb

        self.id = run.id
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder.parent),  # it makes a folder called `wandb` there
            config=run.config,
            settings=wandb.Settings(console="off", silent=True),  # the screen is the progress bar's
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    """A run of MLflow: at `MLFLOW_TRACKING_URI`, or in a database in the folder."""

    def __init__(self, run: TrackedRun):
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        if run.resumed:
            self.id = run.id
            self._client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(name, artifact_location=(run.folder / "artifacts").as_uri())
        )
        self.id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:_MLFLOW_VALUE]) for key, value in run.config.items()]
        for start in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(self.id, params=params[start : start + _MLFLOW_BATCH])

    def log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


_MLFLOW_BATCH, _MLFLOW_VALUE = 100, 500
"""Parameters that a server takes at once, and characters of one that every server takes."""


class _Trackio:
    """A run of trackio: in a database in the folder; `trackio show` draws it."""

    def __init__(self, run: TrackedRun):
        os.environ.setdefault("TRACKIO_DIR", str(run.folder))  # read when trackio is imported
        import trackio

        self.id = run.id
        self._run = trackio.init(project=PROJECT, name=f"{run.name}-{run.id}", resume="allow", config=run.config)

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


_BACKENDS: dict[TrackerKind, Callable[[TrackedRun], _Backend]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}
