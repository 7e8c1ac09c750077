"""Start a training function on Ray Train workers and turn what goes wrong into one readable error.

Knows Ray Train and the hardware; nothing of models or data.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from mmllm_core.errors import EnvironmentLack, MmllmError, TrainingError, first_line


@dataclass(frozen=True)
class Workers:
    """How many workers a run has, what each gets, and how failures are met."""

    count: int
    least: int | None = None
    """Go on with as few where `count` are not to be had (Ray Train's elastic scaling); exactly `count` if not given."""
    gpus: float | None = None
    """Of each; 1 where Ray has enough for the least number of workers, else 0, if not given."""
    cpus: int = 1
    """Cores of each that has no GPU."""
    max_restarts: int = 0
    """How often the run starts again after a worker died; -1 for always."""


@dataclass(frozen=True)
class Kept:
    """Where checkpoints go, and which are kept."""

    storage: str
    """A folder that all nodes see, or a URL of any filesystem that pyarrow or fsspec knows."""
    count: int = 1
    """The last one always, the others by the lowest `score`."""
    score: str | None = None
    """A reported metric."""


def run_workers(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    name: str,
    workers: Workers,
    kept: Kept,
) -> Result:
    """Run `worker(config)` on Ray Train workers and return the run's result.

    Args:
        config: picklable, given to every worker.
        name: where a run of this name has left checkpoints, workers find the last in `ray.train.get_checkpoint`.

    Raises:
        TrainingError: a worker failed; the message is the cause's own.
        EnvironmentLack: the cluster is too small, or the storage cannot be written to.
    """
    gc.collect()  # a Ray Data job that failed before holds its actors' CPUs until Python collects them
    gpus = gpus_of_each(workers)
    _require_room(name, workers, gpus)
    filesystem, folder = open_storage(kept.storage)
    trainer = TorchTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=workers.count if workers.least is None else (workers.least, workers.count),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, "GPU": gpus} if gpus else {"CPU": workers.cpus},
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=workers.max_restarts),
            checkpoint_config=CheckpointConfig(
                num_to_keep=kept.count, checkpoint_score_attribute=kept.score, checkpoint_score_order="min"
            ),
        ),
    )
    with readable_errors(name):
        return trainer.fit()


@cache
def open_storage(storage: str) -> tuple[Any, str]:
    """A pyarrow filesystem and the path in it; proven writable, once in a process.

    Raises:
        EnvironmentLack: it cannot be written to; the message names it.
    """
    from fsspec.core import url_to_fs
    from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

    try:
        if "://" not in storage:
            filesystem, folder = LocalFileSystem(), str(Path(storage).expanduser().absolute())
        elif storage.split(":", 1)[0] in ("s3", "gs", "gcs"):
            filesystem, folder = FileSystem.from_uri(storage)
        else:
            inner, folder = url_to_fs(storage)
            filesystem = PyFileSystem(FSSpecHandler(inner))
        filesystem.create_dir(folder, recursive=True)
        probe = f"{folder}/.mmllm-probe"
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"")
        filesystem.delete_file(probe)
    except (OSError, ValueError, ImportError) as error:
        said = first_line(error)
        raise EnvironmentLack(
            f"checkpoint.storage: {storage} cannot be written to: {said}: give another place, or the rights to it"
        ) from error
    return filesystem, folder


def remove_run(storage: str, name: str) -> None:
    """Remove what Ray Train kept of a run."""
    filesystem, folder = open_storage(storage)
    with suppress(FileNotFoundError):
        filesystem.delete_dir(f"{folder}/{name}")


def write_beside_checkpoints(storage: str, name: str, file: str, text: str) -> None:
    """Keep a small file where a run's checkpoints are."""
    filesystem, folder = open_storage(storage)
    filesystem.create_dir(f"{folder}/{name}", recursive=True)
    with filesystem.open_output_stream(f"{folder}/{name}/{file}") as stream:
        stream.write(text.encode())


def read_beside_checkpoints(storage: str, name: str, file: str) -> str:
    """What `write_beside_checkpoints` kept.

    Raises:
        OSError: there is no such file.
    """
    filesystem, folder = open_storage(storage)
    with filesystem.open_input_stream(f"{folder}/{name}/{file}") as stream:
        return bytes(stream.read()).decode()


def has_checkpoints(storage: str, name: str) -> bool:
    """Whether Ray Train keeps a checkpoint of a run that it could go on from."""
    from pyarrow.fs import FileSelector

    filesystem, folder = open_storage(storage)
    found = filesystem.get_file_info(FileSelector(f"{folder}/{name}", allow_not_found=True))
    return any(info.base_name.startswith("checkpoint_") and not info.is_file for info in found)


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Turn what Ray wraps around a worker's exception into one line of the exception's own.

    Raises:
        TrainingError: a worker of Ray Train or Ray Data failed.
    """
    try:
        yield
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise TrainingError(f"{name}: {_root_cause(error)}") from error


def gpus_of_each(workers: Workers) -> float:
    """GPUs that each worker gets."""
    return workers.gpus if workers.gpus is not None else float(has_gpus(workers.least or workers.count))


def has_gpus(workers: int) -> bool:
    """Whether Ray has a GPU for each worker."""
    return bool(ray.cluster_resources().get("GPU", 0) >= workers)


def prepare_ray_data() -> None:
    """Leave the screen to our own bars, and let a worker's exception come through as it was raised."""
    import ray.data

    gc.collect()  # as before Ray Train's workers
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    logger = logging.getLogger("ray.data")
    if logger.level != logging.INFO:  # which was asked for
        logger.setLevel(logging.CRITICAL)  # its errors are tracebacks of what is raised here anyway


def _require_room(name: str, workers: Workers, gpus: float) -> None:
    there = ray.cluster_resources()
    least = workers.least or workers.count
    if gpus and there.get("GPU", 0) < least * gpus:
        raise EnvironmentLack(
            f"{name}: {least} workers of {gpus:g} GPUs do not fit the {there.get('GPU', 0):g} GPUs that Ray has: lower "
            "'workers' or 'gpus_per_worker'"
        )
    if not gpus and there.get("CPU", 0) < least * workers.cpus:
        raise EnvironmentLack(
            f"{name}: {least} workers of {workers.cpus} CPUs do not fit the {there.get('CPU', 0):g} CPUs that Ray has: "
            "lower 'workers'"
        )


def worker_device() -> str:
    """The torch device of this Ray Train worker."""
    return str(ray.train.torch.get_device())


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    cause: BaseException = next(iter(failures.values()), getattr(error, "controller_failure", None) or error)
    while True:
        # Ray's wrappers come first: one that carries an MmllmError passes for an instance of it.
        deeper = getattr(cause, "cause", None) or (None if isinstance(cause, MmllmError) else cause.__cause__)
        if not isinstance(deeper, BaseException):
            break
        cause = deeper
    said = str(cause) if isinstance(cause, MmllmError) else f"{type(cause).__name__}: {cause}"
    return said.splitlines()[0]  # Ray Data appends advice of its own
