"""The command line: foreseen errors are one line, and the doctor tells the truth."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster.doctor import examine
from cluster.server import require_free_port
from mmllm_core.errors import EnvironmentLack


def run(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MMLLM_HOME": str(home), "COLUMNS": "200"}
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120
    )


def test_serving_without_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    done = run("serve", "--port", "8123", home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("mmllm:")
    assert "make demo" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "no-such-recipe"), "no-such-recipe"),
        (("train", "embedded-instruct", "lora.rnak=8"), "lora.rnak"),
        (("train", "embedded-instruct", "steps"), "key=value"),
        (("train", "embedded-instruct", "steps=-1"), "steps"),
        (("train", "embedded-clip", "name=../features"), "name"),
        (("embed", "embedded-clip"), "embedded-clip"),
        (("train", "none.yaml"), "none.yaml: no such file"),
        (("serve", "--profile", "no-such-profile"), "no-such-profile"),
        (("evaluate", "--bundle", "/nowhere"), "/nowhere"),
        (("evaluate", "--text"), "no bundle yet"),
        (("evaluate", "--text", "--save", "answers.jsonl"), "--save"),
        (("evaluate", "--text", "--file", "asked.json"), "--file"),
        (("evaluate", "--images", "pictures"), "--file"),
        (("evaluate", "--save", "/dev/null/answers.jsonl"), "--save /dev/null/answers.jsonl"),
        (("chat", "hello", "--base-url", "http://127.0.0.1:9"), "make serve"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments: tuple[str, ...], named: str, tmp_path: Path) -> None:
    done = run(*arguments, home=tmp_path)
    assert done.returncode == 1
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "no-such-recipe"),
        ("train", "--resume", "no-such-run"),
        ("report", "no-such-run"),
        ("embed", "no-such-recipe"),
        ("plan", "no-such-recipe"),
        ("evaluate", "--bundle", "/nowhere"),
        ("export", "--format", "merged-lm", "--out", "x", "--bundle", "/nowhere"),
        ("import", "llava", "/nowhere/at/all"),
        ("serve", "--bundle", "/nowhere"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_told_before_torch_and_ray_are_loaded(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Which take seconds."""
    script = (
        "import sys\n"
        "from cluster.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('loaded:', *{'torch', 'ray'} & set(sys.modules))\n"
    )
    environment = os.environ | {"MMLLM_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (1, "loaded:"), done.stderr


@pytest.mark.parametrize("content", [b"name: [x\n", b"17", b"\xff\xfe"], ids=["not YAML", "a number", "not UTF-8"])
def test_a_recipe_file_that_holds_no_recipe_is_one_line_that_names_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    done = run("train", str(tmp_path / "mine.yaml"), home=tmp_path)
    assert done.returncode == 1
    assert "mine.yaml" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_phi_profile_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    done = run("serve", "--profile", "phi", "--port", "8124", home=tmp_path)
    assert done.returncode == 1
    assert "GPU" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_taken_port_is_refused_before_any_work_and_a_free_one_is_not(host: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        try:
            taken.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentLack, match=str(port)):
            require_free_port(host, port)
    require_free_port(host, port)


def test_the_doctor_sees_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert next(check for check in examine(port) if check.name.startswith("port")).state == "stop"


def test_the_doctor_sees_what_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLLM_HOME", str(tmp_path))
    states = {check.name: check.state for check in examine()}
    assert states["bundle"] == "lack"
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "latest").write_text("some")
    assert {check.name: check.state for check in examine()}["bundle"] == "ok"
