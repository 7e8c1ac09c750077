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

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

ISOLATED = ["unshare", "--pid", "--fork", "--mount-proc", "--net", "--kill-child"]


@pytest.fixture(scope="module")
def found(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.serve_apps.autoscaled_nodes` saw."""
    if not shutil.which("unshare") or subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here: run as root on Linux, with util-linux")
    # Sockets' paths are short, and pytest's folders long.
    with tempfile.TemporaryDirectory(prefix="mmllm-") as name:
        folder = Path(name)
        script = 'ip link set lo up && exec "$@"'
        out = folder / "found.json"
        command = [sys.executable, "-m", "tests.serve_apps.autoscaled_nodes", str(bundle.folder), str(out)]
        ran = subprocess.run(
            [*ISOLATED, "sh", "-c", script, "sh", *command],
            cwd=Path(__file__).parents[2],
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            capture_output=True,
            text=True,
            check=False,
            timeout=800,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        seen: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return seen


def test_at_rest_there_is_a_node_for_text_alone(found: dict[str, Any]) -> None:
    assert found["at_rest"] == {"vision": 0, "audio": 0, "text": 1}


@pytest.mark.parametrize(("modality", "other"), [("vision", "audio"), ("audio", "vision")])
def test_a_request_at_zero_brings_one_node_is_answered_and_the_node_goes(
    found: dict[str, Any], modality: str, other: str
) -> None:
    asked = found[modality]
    assert asked["ending"]["how"] == "answered"
    assert asked["up"][modality] == 1
    assert asked["most"][modality] == 1
    assert asked["most"][other] == 0
    assert asked["after"][modality] == 0


def test_text_is_answered_all_the_while_by_its_one_node(found: dict[str, Any]) -> None:
    assert {ending["how"] for ending in found["text"]} == {"answered"}
    assert len(found["text"]) > 10
    assert {sample["text"] for sample in found["samples"]} == {1}


def test_requests_recover_from_a_node_that_is_killed(found: dict[str, Any]) -> None:
    killed = found["killed"]
    ends = [ending["how"] for ending in killed["endings"]]
    assert len(ends) == 60
    # a stream that had begun may tell of an error; nothing hangs, and nothing stops without a word
    assert set(ends) <= {"answered", "error event"}
    assert set(ends[-20:]) == {"answered"}
    assert killed["nodes"]
    assert killed["node"] not in killed["nodes"]
