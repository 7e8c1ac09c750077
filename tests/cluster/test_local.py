"""The Ray that a command starts: nobody joins it without its token, and it shows no dashboard."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STARTS = """
import os, subprocess, sys
from pathlib import Path
from cluster.local import local_ray

join = "import ray; ray.init(address=os.environ['ADDRESS'], logging_level='ERROR'); print(len(ray.nodes()))"
with local_ray():
    import ray
    context = ray.get_runtime_context()
    print("dashboard:", ray._private.worker._global_node.webui_url or "none")
    print("saved:", (Path.home() / ".ray" / "auth_token").exists())
    token_file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    print("modes:", *(oct(path.stat().st_mode & 0o777) for path in (token_file, token_file.parent)))
    for token in (token_file.read_text(), "0" * 64):
        environment = os.environ | {"ADDRESS": context.gcs_address, "RAY_AUTH_TOKEN": token}
        joined = subprocess.run([sys.executable, "-c", "import os; " + join], env=environment, capture_output=True)
        print("joined:", joined.returncode == 0)
    from serve_apps.proxy import PROXY_ENVIRONMENT
    [(name, value)] = PROXY_ENVIRONMENT.items()
    print("sifted:", ray.get(ray.remote(lambda: os.environ.get(name)).remote()) == value)
print("kept:", token_file.parent.exists(), sorted(name for name in os.environ if name.startswith("RAY_AUTH")))
"""


def test_nobody_joins_without_the_token(tmp_path: object) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "MMLLM_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", STARTS], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = [line for line in ran.stdout.splitlines() if ": " in line]
    assert [line for line in said if line.startswith(("dash", "saved", "modes", "joined", "sifted", "kept"))] == [
        "dashboard: none",
        "saved: False",
        "modes: 0o600 0o700",
        "joined: True",
        "joined: False",
        "sifted: True",
        "kept: False []",
    ]


def test_a_ray_that_somebody_else_started_is_not_taken_for_ours(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short, for Ray's sockets lie there
        note = Path(folder) / "ray" / "ray_current_cluster"
        note.parent.mkdir()
        note.write_text("127.0.0.1:1")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"HOME": str(tmp_path), "MMLLM_HOME": str(tmp_path), "RAY_TMPDIR": folder}
        starts = "from cluster.local import local_ray\nwith local_ray(): pass"
        ran = subprocess.run(
            [sys.executable, "-c", starts], env=environment, capture_output=True, text=True, timeout=300
        )
    assert ran.returncode == 0, ran.stderr[-2000:]
