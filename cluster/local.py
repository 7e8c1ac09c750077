"""A Ray of our own on this machine: started for one command, and ended with it.

Every deployment asks for its modality's resource, so the local node offers some of each.
"""

import logging
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from mmllm_core.errors import EnvironmentLack

MODALITIES = ("vision", "audio", "text")

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log of every worker.")]
"""The option of every command that starts a Ray of its own."""


def quieten() -> None:
    """Keep libraries from talking over our own output; must run before they are imported."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "" if _has_cuda() else "cpu"),
        "PYTHONWARNINGS": "ignore",
    }.items():
        if value:
            os.environ.setdefault(name, value)


@contextmanager
def local_ray(*, verbose: bool = False) -> Iterator[None]:
    """Run the block on a Ray that belongs to this process, or on the cluster that `RAY_ADDRESS` names.

    Ctrl-C and SIGTERM end the block; either way, what was started is ended.
    """
    import ray

    from serve_apps.proxy import PROXY_ENVIRONMENT
    from train_jobs.accelerators import usable_cores

    address = os.environ.get("RAY_ADDRESS")
    common = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if address:
        ray.init(address=address, **common)
    else:
        os.environ.update(PROXY_ENVIRONMENT)
        if not os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
            # Ray asks for a token by default, and would share one of this user's in a file that others may read.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # Two CPUs at least: two workers then share the one core of a small machine, slowly.
        ray.init(
            num_cpus=max(2, usable_cores()),
            resources=dict.fromkeys(MODALITIES, 8.0),
            include_dashboard=False,
            **common,
        )
    # After Ray, which sets handlers of its own; and a shell may have started us with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    for name in ("ray.train", "ray.serve", "ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)
    try:
        yield
    finally:
        # A second Ctrl-C must not leave processes behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ray.shutdown()
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def running_ray(*, verbose: bool = False) -> Iterator[None]:
    """Run the block on a Ray that runs already: the one that `RAY_ADDRESS` names, or the last one on this machine.

    Raises:
        EnvironmentLack: there is none.
    """
    import ray

    level = logging.INFO if verbose else logging.ERROR
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=verbose, logging_level=level)
    except ConnectionError as error:
        raise EnvironmentLack(
            "no Ray runs here: start the assistant with 'mmllm serve', or name a RAY_ADDRESS"
        ) from error
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        ray.shutdown()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _has_cuda() -> bool:
    return any(os.path.exists(path) for path in ("/dev/nvidia0", "/dev/nvidiactl"))
