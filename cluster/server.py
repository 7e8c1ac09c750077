"""Run the assistant on this machine: one bundle, one Serve config, one URL."""

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.local import end_quietly
from mmllm_core.bundle import Bundle
from mmllm_core.errors import EnvironmentLack, MmllmError
from serve_apps.config import ServeConfig

PORT_MEND = "stop what listens there or give another with --port (make: PORT=8001)"


def port_problem(host: str, port: int) -> str | None:
    """Why a port cannot be listened on, in the system's words, or None."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name with addresses of both families is listened on by IPv4.
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return str(error.strerror)
    return None


def require_free_port(host: str, port: int) -> None:
    """Refuse to start what would fail at the very end.

    Raises:
        EnvironmentLack: something listens there already.
    """
    if problem := port_problem(host, port):
        raise EnvironmentLack(f"port {port} on {host} cannot be used ({problem}): {PORT_MEND}")


def local_config(name: str, port: int | None = None, overrides: dict[str, Any] | None = None) -> ServeConfig:
    """A Serve config as this machine runs it: its CLIP reads the feature store that is kept here.

    Args:
        name: of a shipped config, or a YAML file.
        port: instead of the config's own.
        overrides: dotted keys and their values.

    Raises:
        ConfigError: unknown name, unknown key, or settings that cannot work together.
    """
    from serve_apps.config_files import load_serve_config, with_feature_store

    return with_feature_store(load_serve_config(name, (overrides or {}) | ({"http.port": port} if port else {})))


def require_devices(config: ServeConfig) -> None:
    """Refuse a config whose replicas would wait for a GPU for ever.

    Raises:
        EnvironmentLack: a deployment wants CUDA and this machine has none.
    """
    wanting = [name for name in ("clip", "whisper", "phi") if getattr(config, name).device == "cuda"]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentLack(
            f"serve config '{config.name}' runs {', '.join(wanting)} on an NVIDIA GPU and this machine has none that "
            "torch can use: serve the 'embedded' profile here"
        )


@contextmanager
def serving(bundle: Bundle, config: ServeConfig) -> Iterator[str]:
    """Deploy on the Ray that is running and yield the base URL; the deployment ends with the block.

    A Serve that ran there before goes on, with its other applications.

    Raises:
        MmllmError: a deployment did not start; the message names it and says why.
        ConfigError: the file of keys cannot be used.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions

    # Which has set a level of its own as it was imported, whatever was asked for before.
    logging.getLogger("ray.serve").setLevel(logging.getLogger("ray").level)
    from serve_apps.api_keys import read_keys
    from serve_apps.builder import APP_NAME, build, logging_config

    if config.access.keys_file:
        read_keys(config.access.keys_file)
    application = build(config, bundle.folder)
    before = serve.status()
    serve_is_ours = not (before.proxies or before.applications)
    serve.start(
        http_options=HTTPOptions(host=config.http.host, port=config.http.port),
        logging_config=logging_config(config.observability),
    )
    try:
        try:
            serve.run(application, name=APP_NAME, route_prefix="/")
        except RuntimeError as error:
            raise MmllmError(_why_not_running(APP_NAME) or f"the assistant did not start: {error}") from error
        yield config.http.base_url
    finally:
        if serve_is_ours:
            end_quietly(serve.shutdown)
        else:
            serve.delete(APP_NAME)


def reload_bundle(bundle: Bundle, model: str | None = None) -> str:
    """Let another bundle answer in the service on the Ray that is connected, without a restart.

    Requests that are on their way end on the bundle that they began with.

    Args:
        bundle: of the same base as the one that is served; every replica reads it where it lies.
        model: the name under which it shall answer; the first that is served if None.

    Returns:
        The model's name.

    Raises:
        EnvironmentLack: no assistant is served there.
        BundleError: the bundle has another base.
        ConfigError: there is no room for it beside the one that answers.
        MmllmError: no such model is served, or a replica could not load the bundle and goes on with the old one.
    """
    from ray import serve

    from serve_apps.builder import APP_NAME, PHI, build
    from serve_apps.servable import require_reloadable
    from serve_apps.served_bundles import ServedBundle, require_base

    if APP_NAME not in serve.status().applications:
        raise EnvironmentLack("no assistant is served on this Ray: start it with 'mmllm serve'")
    config: ServeConfig = serve.get_app_handle(APP_NAME).service_config.remote().result()
    replicas = serve.get_deployment_handle(PHI, APP_NAME)
    served: dict[str, ServedBundle] = replicas.broadcast("served").results()[0]
    first = next(iter(served))
    model = model or first
    if model not in served:
        raise MmllmError(f"model '{model}' is not served: choose one of {', '.join(served)}")
    require_base(replicas.base.remote().result(), first, bundle)
    require_reloadable(config.phi)
    wanted = served | {model: ServedBundle.of(bundle)}
    adapters = {name: served_bundle.folder for name, served_bundle in wanted.items() if name != first}
    config = config.model_copy(update={"phi": config.phi.model_copy(update={"adapters": adapters})})
    serve.run(build(config, wanted[first].folder, first), name=APP_NAME, route_prefix="/")
    if any(found[model] != wanted[model] for found in replicas.broadcast("served").results()):
        raise MmllmError(
            f"a replica could not load bundle '{bundle.info.name}' and goes on with the old one; its log says why: "
            "reload one that can be loaded, for new replicas begin with this one"
        )
    return model


def wait_for_ever() -> None:
    """Block until Ctrl-C."""
    while True:
        time.sleep(3600)


def _why_not_running(app: str) -> str | None:
    """The last line of what Serve says of the deployment that failed."""
    from ray import serve

    for name, deployment in serve.status().applications[app].deployments.items():
        if deployment.message and deployment.status != "HEALTHY":
            lines = [line for line in deployment.message.splitlines() if line.strip()]
            return f"deployment {name} did not start: {lines[-1].strip()}"
    return None
