"""The Space: its folder, its settings, and its program as it runs there: without Ray."""

import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from gradio_client import Client
from PIL import Image

from mmllm_core.bundle import Bundle
from mmllm_core.errors import ConfigError, EnvironmentLack, ExportError
from serve_apps.config_files import load_serve_config
from serve_apps.in_process import serving_in_process
from serve_apps.space import zero_gpu
from serve_apps.space.folder import write_space
from serve_apps.space.page import open_page
from serve_apps.space.settings import SpaceSettings
from serve_apps.space.zero_gpu import ZeroGpuPhi
from tests.serve_apps.conftest import free_port, page_answer

ROOT = Path(__file__).parents[3]
OF_THE_SDK = ["gradio[oauth,mcp]=={}", "uvicorn>=0.14.0", "websockets>=10.4", "spaces"]
"""What the hub installs beside the requirements of a Space that runs Gradio."""


def front_matter(readme: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(readme.read_text().split("---")[1])
    return found


def pins(file: Path) -> dict[str, str]:
    return {
        name.lower().replace("_", "-"): pin
        for name, _, pin in (line.partition("==") for line in file.read_text().splitlines())
    }


@contextmanager
def running(folder: Path, python: Path, **environment: str) -> Iterator[Client]:
    """The Space's program in its own folder, and a client of its page."""
    told = {name: os.environ[name] for name in ("PATH", "HOME", "MMLLM_HOME")} | environment
    port = free_port()
    told |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    told["PYTHONUNBUFFERED"] = "1"
    command = [str(python), "app.py"]
    with subprocess.Popen(
        command, cwd=folder, env=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as program:
        try:
            assert program.stdout is not None
            said = []
            for line in program.stdout:
                said.append(line)
                if "Running on local URL" in line:
                    break
            else:
                pytest.fail("".join(said))
            yield Client(f"http://127.0.0.1:{port}", verbose=False)
        finally:
            program.kill()


def require_answers(page: Client, folder: Path) -> None:
    picture = folder / "dot.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    for files in ([], [picture]):
        (kind, text), _ = page_answer(page, "What color is it?", *files)
        assert kind is None, text
        assert text.strip()


def test_the_folder_holds_all_that_a_space_needs_at_the_versions_that_are_tested(
    bundle: Bundle, tmp_path: Path
) -> None:
    write_space(tmp_path / "space", "shapes", bundle)
    folder = tmp_path / "space"
    assert {path.name for path in folder.iterdir()} == {
        *("app.py", "README.md", "requirements.txt", "bundle", "mmllm_core", "serve_apps")
    }
    assert Bundle.open(folder / "bundle").info == bundle.info
    assert not list(folder.rglob("__pycache__"))
    header, constraints = front_matter(folder / "README.md"), pins(ROOT / "constraints.txt")
    assert (header["title"], header["sdk"], header["app_file"]) == ("shapes", "gradio", "app.py")
    assert header["sdk_version"] == constraints["gradio"]
    assert header["python_version"] == "3.11"
    assert header["models"] == ["HuggingFaceTB/SmolLM2-135M-Instruct", "openai/whisper-tiny.en"]
    wanted = pins(folder / "requirements.txt")
    assert wanted == {name: constraints[name] for name in wanted}
    assert not wanted.keys() & {"ray", "gradio", "pydantic"}  # the last two are the hub's to choose
    with pytest.raises(ExportError, match="not an empty folder"):
        write_space(folder, "shapes", bundle)


@pytest.mark.slow
def test_the_program_answers_where_there_is_no_ray(bundle: Bundle, tmp_path: Path) -> None:
    write_space(tmp_path / "space", "shapes", bundle)
    ray = tmp_path / "without" / "ray"
    ray.mkdir(parents=True)
    (ray / "__init__.py").write_text("raise ImportError('a Space has no Ray')\n")
    with running(tmp_path / "space", Path(sys.executable), PYTHONPATH=str(ray.parent)) as page:
        require_answers(page, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_fresh_environment_as_the_hub_makes_it_runs_the_folder(bundle: Bundle, tmp_path: Path) -> None:
    write_space(tmp_path / "space", "shapes", bundle)
    version = front_matter(tmp_path / "space" / "README.md")["sdk_version"]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["-r", str(tmp_path / "space" / "requirements.txt"), *(part.format(version) for part in OF_THE_SDK)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with running(tmp_path / "space", python) as page:
        require_answers(page, tmp_path)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"MMLLM_BUNDLE": "a/b", "MMLLM_BASE_URL": "https://c"}, "set one of them"),
        ({"MMLLM_API_KEY": "k"}, "MMLLM_BASE_URL"),
        ({"MMLLM_BASE_URL": "c"}, "http://"),
    ],
)
def test_variables_that_cannot_be_are_named(environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        SpaceSettings.of_environment(environment)


def test_a_space_without_an_assistant_or_with_a_nameless_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mmllm space deploy"):
        SpaceSettings().open_bundle(tmp_path)
    with pytest.raises(ConfigError, match="neither a folder nor a repository"):
        SpaceSettings(bundle="../x").open_bundle(tmp_path)


def test_a_space_asks_a_service_elsewhere_and_says_when_it_cannot(bundle: Bundle, tmp_path: Path) -> None:
    config = load_serve_config("embedded", {"ui": False, "phi.kv_cache_bytes": 60_000_000})
    with serving_in_process(bundle, config) as url:
        settings = SpaceSettings.of_environment({"MMLLM_BASE_URL": f"{url}/v1/"})
        assert settings.base_url == url
        with open_page(settings, tmp_path) as page:
            assert bundle.info.name in str(page.config)
    with pytest.raises(EnvironmentLack, match="cannot be asked"), open_page(settings, tmp_path):
        pass


def end_of_the_process_that_has_the_gpu(borrowed: ZeroGpuPhi) -> None:
    """What it keeps for later calls, and here this process would keep."""
    zero_gpu._loaded(*borrowed._asked).shutdown()
    zero_gpu._loaded.cache_clear()


@pytest.mark.lengthy
def test_a_borrowed_gpu_gives_the_same_answer(bundle: Bundle, request: pytest.FixtureRequest) -> None:
    """`spaces.GPU` leaves a function as it is where no GPU is lent, as the stand-in here does."""
    config = load_serve_config("embedded", {"ui": False, "phi.kv_cache_bytes": 60_000_000})
    borrowed = ZeroGpuPhi(bundle, config, lambda function, duration: function)
    request.addfinalizer(lambda: end_of_the_process_that_has_the_gpu(borrowed))
    told = []
    for phi in (None, borrowed):
        with serving_in_process(bundle, config, phi) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            said: Any = [{"role": "user", "content": "Hello"}]
            stream = client.chat.completions.create(
                model=bundle.info.name, messages=said, max_tokens=16, temperature=0, stream=True
            )
            told.append("".join(chunk.choices[0].delta.content or "" for chunk in stream))
    assert told[0]
    assert told[0] == told[1]
