"""Start a training function on Ray Train workers and turn what goes wrong into one readable error.

Knows Ray Train and the hardware; nothing of models or data.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
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
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"{name}: {_root_cause(error)}") from error


def has_gpus(workers: int) -> bool:
    """Whether Ray has a GPU for each worker."""
    return bool(ray.cluster_resources().get("GPU", 0) >= workers)


def quiet_ray_data() -> None:
    """Leave the screen to our own bars; Ray Data's log files keep everything."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def worker_device() -> str:
    """The torch device of this Ray Train worker."""
    return str(ray.train.torch.get_device())


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    cause: BaseException = next(iter(failures.values()), error)
    while True:
        deeper = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, MmllmError) or not isinstance(deeper, BaseException):
            break
        cause = deeper
    return str(cause) if isinstance(cause, MmllmError) else f"{type(cause).__name__}: {cause}".splitlines()[0]
