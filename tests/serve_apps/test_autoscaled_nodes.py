"""Scaling from zero with real nodes, real Serve and Ray's own autoscaler: what is asked for comes, and goes again."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mmllm_core.bundle import Bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ISOLATED = ["unshare", "--pid", "--fork", "--mount-proc", "--net", "--kill-child"]


@pytest.fixture(scope="module")
def images(bundle: Bundle) -> dict[str, Any]:
    """What was seen as an image came."""
    return observed(bundle, "vision")


@pytest.fixture(scope="module")
def rest(bundle: Bundle) -> dict[str, Any]:
    """What was seen as speech came, and as a node ended."""
    return observed(bundle, "audio", "loss")


def observed(bundle: Bundle, *parts: str) -> dict[str, Any]:
    """What `tests.serve_apps.autoscaled_nodes` sees."""
    if not shutil.which("unshare") or subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here: run as root on Linux, with util-linux and iproute2")
    # Sockets' paths are short, and pytest's folders long.
    with tempfile.TemporaryDirectory(prefix="mmllm-") as name:
        out = Path(name) / "found.json"
        command = [sys.executable, "-m", "tests.serve_apps.autoscaled_nodes", str(bundle.folder), str(out), *parts]
        ran = subprocess.run(
            [*ISOLATED, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command],
            cwd=Path(__file__).parents[2],
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            capture_output=True,
            text=True,
            check=False,
            timeout=550,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        seen: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return seen


def rose_and_fell(found: dict[str, Any], modality: str, other: str) -> None:
    """A request brought one node of its modality, was answered, and the node went."""
    assert found["at_rest"] == {"vision": 0, "audio": 0, "text": 1}
    asked = found[modality]
    assert asked["ending"]["how"] == "answered"
    assert asked["up"][modality] == 1
    assert asked["most"][modality] == 1
    assert asked["most"][other] == 0
    assert asked["after"][modality] == 0


def text_was_answered(found: dict[str, Any]) -> None:
    """All the while, by its one node."""
    assert {ending["how"] for ending in found["text"]} == {"answered"}
    assert len(found["text"]) > 10
    assert {sample["text"] for sample in found["samples"]} == {1}


def test_an_image_at_zero_nodes_brings_one_is_answered_and_the_node_goes(images: dict[str, Any]) -> None:
    rose_and_fell(images, "vision", "audio")
    text_was_answered(images)


@pytest.mark.long
def test_speech_at_zero_nodes_brings_one_is_answered_and_the_node_goes(rest: dict[str, Any]) -> None:
    rose_and_fell(rest, "audio", "vision")
    text_was_answered(rest)


@pytest.mark.long
def test_requests_recover_from_a_node_that_is_killed(rest: dict[str, Any]) -> None:
    lost = rest["loss"]
    ends = [ending["how"] for ending in lost["endings"]]
    assert len(ends) == 60
    # a stream that had begun may tell of an error; nothing hangs, and nothing stops without a word
    assert set(ends) <= {"answered", "error event"}
    assert set(ends[-20:]) == {"answered"}
    assert lost["nodes"]
    assert lost["node"] not in lost["nodes"]
