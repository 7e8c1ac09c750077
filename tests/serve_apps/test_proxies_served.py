"""What a service listens for and where, behind either proxy, and what is left when `mmllm serve` is killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from mmllm_core.bundle import Bundle
from serve_apps.api_keys import ApiKey, add_key
from tests.serve_apps.conftest import (
    BOTH_PROXIES,
    SERVE_AND_LONG_HAPROXY,
    SMALL_LM,
    TEXT_ALONE,
    Proxy,
    Service,
    config_file,
    deploy,
    free_port,
    own_serve,
)
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

LIGHT = TEXT_ALONE | SMALL_LM


def listeners(family: psutil.Process) -> list[tuple[str, str, int]]:
    """What a process and all that it started listen on: the program or actor, the address, the port."""
    found = []
    for process in [family, *family.children(recursive=True)]:
        try:
            name = process.cmdline()[0].rpartition("/")[2]
            sockets = process.net_connections("tcp")
        except (psutil.Error, IndexError):
            continue
        found += [(name, s.laddr.ip, s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN]
    return found


def asked(port: int) -> int | None:
    """The status with which the service answers at a port, or None if it is not what listens there."""
    base = f"http://127.0.0.1:{port}"
    try:
        if httpx.get(f"{base}/healthz", timeout=10).text != '{"status":"ok"}':
            return None
        return httpx.get(f"{base}/v1/models", timeout=10).status_code
    except httpx.HTTPError:
        return None


@pytest.mark.parametrize("proxy", BOTH_PROXIES)
def test_on_loopback_nobody_else_reaches_the_service(bundle: Bundle, proxy: Proxy) -> None:
    with own_serve(proxy=proxy) as port:
        deploy(bundle, "mmllm", "/", LIGHT | {"http.port": port})
        found = listeners(psutil.Process())
        answering = {(ip, at): asked(at) for _, ip, at in found if asked(at)}
    assert answering["127.0.0.1", port] == 200
    assert {ip for ip, _ in answering} == {"127.0.0.1"}
    assert len(answering) == {"serve": 1, "haproxy": 3}[proxy]  # its replica's, and that of the proxy behind it
    of_haproxy = [(ip, at) for name, ip, at in found if name == "haproxy"]
    assert of_haproxy == ([("127.0.0.1", port)] if proxy == "haproxy" else [])


@pytest.mark.parametrize("proxy", SERVE_AND_LONG_HAPROXY)
def test_where_others_reach_it_every_port_asks_for_a_key(bundle: Bundle, proxy: Proxy, tmp_path: Path) -> None:
    add_key(tmp_path / "keys.yaml", ApiKey(id="alice", sha256="0" * 64))
    with own_serve("0.0.0.0", proxy=proxy) as port:
        keyed = {"http.host": "0.0.0.0", "http.port": port, "access.keys_file": str(tmp_path / "keys.yaml")}
        deploy(bundle, "mmllm", "/", LIGHT | keyed)
        found = listeners(psutil.Process())
        statuses = {at: status for _, _, at in found if (status := asked(at))}
    assert port in statuses
    assert set(statuses.values()) == {401}
    assert len(statuses) == {"serve": 1, "haproxy": 3}[proxy]
    assert [at for name, _, at in found if name == "haproxy"] == ([port] if proxy == "haproxy" else [])


@contextmanager
def serving(bundle: Bundle, proxy: Proxy, folder: Path) -> Iterator[tuple[subprocess.Popen[str], Service]]:
    """`mmllm serve` of its own, ready."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "MMLLM_HOME")} | {"PYTHONPATH": os.getcwd()}
    port = free_port()
    config = config_file(folder, LIGHT)
    command = [sys.executable, "-m", "cluster.cli", "serve", "--bundle", str(bundle.folder)]
    command += ["--profile", str(config), "--port", str(port)]
    log = folder / "serve.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*command, "--proxy", proxy], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert any("Ctrl-C ends all of it" in line for line in process.stdout), log.read_text()[-2000:]
            yield process, Service(f"http://127.0.0.1:{port}", bundle.info.name, "mmllm")
        finally:
            process.kill()


@pytest.mark.skipif(len(BOTH_PROXIES) == 1, reason="HAProxy comes with Ray on Linux alone")
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL])
def test_nothing_of_haproxy_is_left(bundle: Bundle, tmp_path: Path, number: signal.Signals) -> None:
    with serving(bundle, "haproxy", tmp_path) as (process, service):
        assert httpx.get(f"{service.base_url}/v1/models").status_code == 200
        family = psutil.Process(process.pid).children(recursive=True)
        (haproxy,) = [child for child in family if child.name() == "haproxy"]
        files = Path(haproxy.cmdline()[haproxy.cmdline().index("-f") + 1])
        assert files.exists()
        process.send_signal(number)
        wait_for(lambda: not haproxy.is_running(), "HAProxy to end")
        wait_for(lambda: process.poll() is not None, "the command to end")
        assert number == signal.SIGKILL or not files.exists()
