"""What is kept of the Rays that commands started: each finds its own token, and none takes another's away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local import running_ray
from cluster.ray_record import find_running, recording
from mmllm_core.errors import EnvironmentLack

HOLDS = """
import sys
from cluster.ray_record import recording
with recording() as publish:
    publish(sys.argv[1])
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in [name for name in os.environ if name.startswith("RAY_A")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MMLLM_HOME", str(tmp_path))
    return dict(os.environ)


def hold(address: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Another process that keeps a record until its input ends."""
    command = [sys.executable, "-c", HOLDS, address]
    held = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    return held


def test_two_of_them_have_tokens_of_their_own(environment: dict[str, str]) -> None:
    with hold("192.0.2.1:7001", environment) as other:
        with recording() as publish:
            publish("192.0.2.1:7002")
            with pytest.raises(EnvironmentLack, match=r"2 Rays run here.*RAY_ADDRESS=192\.0\.2\.1:700"):
                find_running(None)
            one, two = find_running("192.0.2.1:7001"), find_running("localhost:7002")
            assert one
            assert two
            assert one.token_file.read_text() != two.token_file.read_text()
            assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(two.token_file)
            assert find_running("192.0.2.9:7001") is None
        assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
        assert not two.token_file.exists()
        assert find_running(None) == one
        other.communicate("")
    assert find_running(None) is None


def test_what_a_killed_process_left_is_removed(environment: dict[str, str], tmp_path: Path) -> None:
    with hold("192.0.2.1:7001", environment) as killed:
        killed.kill()
    assert len(list((tmp_path / "rays").iterdir())) == 1
    assert find_running("192.0.2.1:7001") is None
    assert not list((tmp_path / "rays").iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no address"])
def test_a_ray_that_does_not_answer_is_named(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(EnvironmentLack, match=f"Ray at '{address}' cannot be joined"), running_ray():
        pass
