"""What Ray writes for HAProxy, and what of it is kept; and when it is refused to be used at all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mmllm_core.errors import ConfigError, EnvironmentLack
from serve_apps import haproxy
from serve_apps.config import HttpConfig
from serve_apps.config_files import load_serve_config
from serve_apps.haproxy import HAPROXY_ENVIRONMENT, haproxy_binary, proxies_of
from serve_apps.haproxy_start import UnknownConfig, narrowed
from serve_apps.limits import Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux alone")


def written_by_ray(folder: Path) -> str:
    """A config as Ray writes it for one application with a replica and a proxy to fall back on."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    replica, fallback = ServerConfig("replica", "127.0.0.1", 20_000), ServerConfig("fallback", "127.0.0.1", 8_500)
    backend = BackendConfig("http-mmllm", "/", servers=[replica], fallback_server=fallback, app_name="mmllm")
    options = HTTPOptions(host="127.0.0.1", port=8_000)
    config = HAProxyConfig(
        socket_path=str(folder / "s"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        http_options=options,
        metrics_enabled=False,
    )
    api = HAProxyApi(config, config_file_path=str(folder / "haproxy.cfg"))
    api.set_backend_configs({"http-mmllm": backend})
    api._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text(encoding="utf-8")


def test_nothing_but_http_is_listened_for(tmp_path: Path) -> None:
    config = narrowed(written_by_ray(tmp_path))
    assert [line.strip() for line in config.splitlines() if "bind " in line] == ["bind 127.0.0.1:8000"]
    assert f"stats socket {tmp_path}/s mode 600 level admin expose-fd listeners" in config
    assert "timeout http-request 60s" in config
    for kept_back in ("prometheus", "/stats", "127.0.0.1:514", "log global"):
        assert kept_back not in config
    (tmp_path / "haproxy.cfg").write_text(config, encoding="utf-8")
    checked = subprocess.run(
        [haproxy_binary(), "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("written", "other", "lacking"),
    [
        ("listen stats", "listen stats2", "one frontend"),
        ("frontend prometheus", "frontend metrics", "one address"),
        (" mode 666 ", " mode 0666 ", "one socket"),
        ("defaults", "defaults all", "one section of defaults"),
    ],
)
def test_a_config_of_another_shape_is_refused(tmp_path: Path, written: str, other: str, lacking: str) -> None:
    config = written_by_ray(tmp_path)
    assert written in config
    with pytest.raises(UnknownConfig, match=lacking):
        narrowed(config.replace(written, other))


def test_files_are_for_this_user_and_this_run_alone() -> None:
    http = HttpConfig(proxy="haproxy")
    with proxies_of(http, Limits(request_timeout_s=39.5)) as one, proxies_of(http, Limits()) as other:
        folders = [Path(found["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent for found in (one, other)]
        assert folders[0] != folders[1]
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700, 0o700]
        paths = {name: value for name, value in one.items() if name.startswith("RAY_SERVE_HAPROXY") and "/" in value}
        assert len(paths) == 5
        assert all(Path(value).is_relative_to(folders[0]) for value in paths.values())
        # Ray puts a node's id of 56 letters between, and HAProxy takes 97
        assert len(one["RAY_SERVE_HAPROXY_SOCKET_PATH"]) + 57 <= 97
        assert [found["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] for found in (one, other)] == ["50", "310"]
    assert not any(folder.exists() for folder in folders)


def test_serves_own_proxy_is_asked_for_by_name() -> None:
    with proxies_of(HttpConfig(), Limits()) as found:
        assert found["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_where_it_cannot_run_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    http = HttpConfig(proxy="haproxy")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/nowhere/haproxy")
    with pytest.raises(EnvironmentLack, match="there is no HAProxy"), proxies_of(http, Limits()):
        pass
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(EnvironmentLack, match="runs on Linux alone"), proxies_of(http, Limits()):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(EnvironmentLack, match="unset RAY_ADDRESS"), proxies_of(http, Limits()):
        pass


@pytest.mark.parametrize("host", ["localhost", "::1", "10.0.0.5"])
def test_hosts_on_which_replicas_would_not_be_found_are_refused(host: str) -> None:
    overrides = {"http.proxy": "haproxy", "http.host": host, "access.keys_file": "keys.yaml"}
    with pytest.raises(ConfigError, match=r"does not go with http\.host"):
        load_serve_config("embedded", overrides)


def test_a_ray_that_was_started_for_another_proxy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy, "is_connected", lambda: True)
    ours, serves = load_serve_config("embedded", {"http.proxy": "haproxy"}), load_serve_config("embedded")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="start it without"):
        haproxy.require_proxy(serves)
    with pytest.raises(ConfigError, match="RAY_SERVE_HAPROXY_METRICS_ENABLED"):
        haproxy.require_proxy(ours)
    with proxies_of(ours.http, Limits()) as found:
        for name, value in found.items():
            monkeypatch.setenv(name, value)
        haproxy.require_proxy(ours)
    assert HAPROXY_ENVIRONMENT.items() <= os.environ.items()
