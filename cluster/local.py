"""A Ray of our own on this machine, started for one command and ended with it, and Rays that run already.

Every deployment asks for its modality's resource, so nodes of our own offer some of each.
"""

import io
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Annotated, NoReturn

import typer

from cluster.pins import PINS, require_pins
from cluster.ray_record import find_running, recording, showing_token, token_is_named
from mmllm_core.errors import EnvironmentLack

MODALITY_SHARES = 8.0
"""Of each modality's resource, on a node of our own."""

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
def local_ray(*, verbose: bool = False, proxies: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run the block on a Ray that belongs to this process, or on the cluster that `RAY_ADDRESS` names.

    Ctrl-C and SIGTERM end the block; either way, what was started is ended. A Ray of our own asks for a token that
    `running_ray` finds.

    Args:
        proxies: environment variables of Serve's proxies on a Ray of our own (`serve_apps.haproxy.proxies_of`).

    Raises:
        EnvironmentLack: the cluster cannot be joined or has other packages than a submitted job was pinned to, or the
            home folder cannot be written.
    """
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, signal.default_int_handler)
        if os.environ.get("RAY_ADDRESS"):
            stack.enter_context(running_ray(verbose=verbose))
            stack.enter_context(interruptible(verbose=verbose))
            if pins := os.environ.get(PINS):
                require_pins(json.loads(pins))
        else:
            stack.enter_context(_own_ray(verbose, proxies))
        yield


@contextmanager
def _own_ray(verbose: bool, proxies: Mapping[str, str] | None) -> Iterator[None]:
    import ray

    from cluster.modalities import RESOURCES
    from serve_apps.proxy import PROXY_ENVIRONMENT
    from train_jobs.accelerators import usable_cores

    with ExitStack() as stack:
        os.environ.update(PROXY_ENVIRONMENT if proxies is None else proxies)
        # Ray asks for a token by default, and would share one of this user's in a file that others may read.
        publish = None if token_is_named() else stack.enter_context(recording())
        # Two CPUs at least: two workers then share the one core of a small machine, slowly.
        ray.init(
            "local",  # else it goes to what `ray start` noted on this machine, alive or dead
            num_cpus=max(2, usable_cores()),
            resources=dict.fromkeys(RESOURCES, MODALITY_SHARES),
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=_level(verbose),
        )
        stack.callback(end_quietly, ray.shutdown)
        if publish is not None:
            publish(ray.get_runtime_context().gcs_address)
        with interruptible(verbose=verbose):
            yield


def end_quietly(end: Callable[[], object]) -> None:
    """End Ray or Serve without what Ray prints meanwhile, which `log_to_driver` does not govern: that tasks of the
    actors that it kills itself have failed and will be tried again."""
    with redirect_stdout(io.StringIO()):
        end()


@contextmanager
def running_ray(*, verbose: bool = False) -> Iterator[None]:
    """Run the block on a Ray that runs already: the one that `RAY_ADDRESS` names, or the one on this machine.

    Raises:
        EnvironmentLack: there is none, there are several, or it asks for a token that is not known.
    """
    import ray

    named = os.environ.get("RAY_ADDRESS")
    found = find_running(None if named in (None, "", "auto") else named)
    with ExitStack() as stack:
        if found and not token_is_named():
            stack.enter_context(showing_token(found.token_file))
        _join(found.address if found else named or "auto", verbose=verbose)
        for name in ("ray.serve", "ray"):
            logging.getLogger(name).setLevel(_level(verbose))
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def interruptible(*, verbose: bool = False) -> Iterator[None]:
    """End the block by Ctrl-C and SIGTERM, and let nothing interrupt what is ended after it."""
    # After Ray, which sets handlers of its own; and a shell may have started us with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    for name in ("ray.train", "ray.serve", "ray.data", "ray"):
        logging.getLogger(name).setLevel(_level(verbose))
    try:
        yield
    finally:
        # A second Ctrl-C must not leave processes behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _join(address: str, *, verbose: bool) -> None:
    """Raise EnvironmentLack if that cannot be done."""
    import ray
    from ray.exceptions import AuthenticationError

    try:
        if address != "auto" and "://" not in address:
            require_listener(address)
        ray.init(address=address, log_to_driver=verbose, logging_level=_level(verbose))
    except (OSError, ValueError, AuthenticationError) as error:
        if address == "auto":
            message = (
                "no Ray runs here that can be joined: start the assistant with 'mmllm serve', or name a RAY_ADDRESS "
                "and its RAY_AUTH_TOKEN_PATH"
            )
        else:
            message = (
                f"Ray at '{address}' cannot be joined: nothing answers there, or it asks for another token: use the "
                "MMLLM_HOME of the command that started it, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
            )
        raise EnvironmentLack(message) from error


def require_listener(address: str) -> None:
    """See whether anything listens at `HOST:PORT`, for Ray tries for minutes where nothing does.

    Raises:
        OSError, ValueError: nothing does, or that is no address.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError("this is neither a URL nor HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def n_gpus() -> int:
    """GPUs of this machine that torch can use."""
    if not _has_cuda():
        return 0
    import torch

    return torch.cuda.device_count()


def _level(verbose: bool) -> int:
    return logging.INFO if verbose else logging.ERROR


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _has_cuda() -> bool:
    return any(os.path.exists(path) for path in ("/dev/nvidia0", "/dev/nvidiactl"))
