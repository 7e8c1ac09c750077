"""Start a training function on Ray Train workers and turn what goes wrong into one readable error.

Knows Ray Train and the hardware; nothing of models or data.
"""

import gc
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from mmllm_core.errors import EnvironmentLack, MmllmError, TrainingError


def run_workers(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    workers: int,
    name: str,
    storage: Path,
    cpus: int = 1,
) -> Result:
    """Run `worker(config)` on `workers` Ray Train workers and return the run's result.

    Args:
        config: picklable, given to every worker.
        storage: folder that all nodes see, for checkpoints.
        cpus: cores of a worker, where there are not enough GPUs.

    Raises:
        TrainingError: a worker failed; the message is the cause's own.
        EnvironmentLack: the cluster is too small.
    """
    gc.collect()  # a Ray Data job that failed before holds its actors' CPUs until Python collects them
    use_gpu = has_gpus(workers)
    there = int(ray.cluster_resources().get("CPU", 0))
    if not use_gpu and there < workers * cpus:
        raise EnvironmentLack(
            f"{name}: {workers} workers of {cpus} CPUs do not fit the {there} CPUs that Ray has: lower 'workers'"
        )
    trainer = TorchTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker=None if use_gpu else {"CPU": cpus}
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(name=name, storage_path=str(storage)),
    )
    shutil.rmtree(storage / name, ignore_errors=True)  # Ray would otherwise resume the run of that name
    with readable_errors(name):
        return trainer.fit()


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


def worker_device() -> str:
    """The torch device of this Ray Train worker."""
    return str(ray.train.torch.get_device())


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    cause: BaseException = next(iter(failures.values()), error)
    while True:
        # Ray's wrappers come first: one that carries an MmllmError passes for an instance of it.
        deeper = getattr(cause, "cause", None) or (None if isinstance(cause, MmllmError) else cause.__cause__)
        if not isinstance(deeper, BaseException):
            break
        cause = deeper
    said = str(cause) if isinstance(cause, MmllmError) else f"{type(cause).__name__}: {cause}"
    return said.splitlines()[0]  # Ray Data appends advice of its own
