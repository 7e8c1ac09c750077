"""`mmllm serve` and `mmllm reload` as two terminals run them, and a Serve that others use too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray import serve

from cluster.server import local_config, serving
from mmllm_core.bundle import Bundle
from serve_apps.builder import APP_NAME
from tests.serve_apps.bundles import adapted
from tests.serve_apps.conftest import SMALL_LM, TEXT_ALONE, Service, config_file, free_port

pytestmark = pytest.mark.slow


def say(service: Service) -> str:
    body = service.body("Hello", max_tokens=12, temperature=0)
    return service.client().chat.completions.create(**body).choices[0].message.content or ""


def test_reload_in_another_terminal_finds_what_serve_started(bundle: Bundle, tmp_path: Path) -> None:
    other = adapted(bundle, "other", seed=1)
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "MMLLM_HOME")}
    environment["PYTHONPATH"] = os.getcwd()
    command = [sys.executable, "-m", "cluster.cli"]
    port = free_port()
    config = config_file(tmp_path, TEXT_ALONE | SMALL_LM)
    what = ["--bundle", str(bundle.folder), "--profile", str(config), "--port", str(port)]
    serve_command = [*command, "serve", *what]
    with subprocess.Popen(serve_command, env=environment, stdout=subprocess.PIPE, text=True) as serving_process:
        try:
            assert serving_process.stdout is not None
            assert any("Ctrl-C ends all of it" in line for line in serving_process.stdout)
            service = Service(f"http://127.0.0.1:{port}", bundle.info.name, APP_NAME)
            before = say(service)
            reload_command = [*command, "reload", "--bundle", str(other.folder)]
            done = subprocess.run(reload_command, env=environment, capture_output=True, text=True)
            assert f"model {bundle.info.name} answers by bundle 'other'" in " ".join(done.stdout.split()), done.stderr
            assert say(service) != before
        finally:
            serving_process.send_signal(signal.SIGTERM)
        assert serving_process.stdout.read() == "", "it ends without a word"


def test_a_serve_that_others_use_goes_on(bundle: Bundle, serve_port: int) -> None:
    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Theirs:
        def __call__(self) -> str:
            return "theirs"

    theirs = serve.run(Theirs.bind(), name="theirs", route_prefix="/theirs")
    config = local_config("embedded", serve_port, TEXT_ALONE | SMALL_LM)
    with serving(bundle, config) as url:
        assert say(Service(url, bundle.info.name, APP_NAME))
    assert set(serve.status().applications) == {"theirs"}
    assert theirs.remote().result() == "theirs"
