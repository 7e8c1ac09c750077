"""Three hosts for real: what is trained and served on them survives a link that is cut and a host that ends."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from tests.cluster.hosts import ISOLATED
from tests.train_jobs.conftest import TinyRecipe, tiny_home, tiny_recipe  # noqa: F401
from train_jobs.progress import step_lines

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

STEPS = 40


@pytest.fixture(scope="session")
def _hosts() -> None:
    """Skips where there can be no hosts, before anything is built."""
    if not (shutil.which("unshare") and shutil.which("nsenter") and shutil.which("ip")):
        pytest.skip("no hosts: they want Linux with util-linux and iproute2")
    tried = (
        "ip link add name probe1 type veth peer name probe2 && ip link add name probe3 type bridge && "
        "mount -t tmpfs probe /mnt"
    )
    done = subprocess.run([*ISOLATED, "sh", "-c", tried], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no hosts: namespaces, links and mounts want root ({done.stderr.strip()})")


@pytest.fixture
def found(_hosts: None, tiny_recipe: TinyRecipe, tiny_home: Path) -> dict[str, Any]:  # noqa: F811
    """What `tests.cluster.several_hosts` saw."""
    resolve(load_profile("embedded").audio.source)  # there is no network later
    recipe = tiny_recipe("hosts", steps=STEPS, workers=3, batch_size=6, checkpoint={"every_steps": 5}, max_restarts=9)
    with tempfile.TemporaryDirectory(prefix="mmllm-") as name:
        file = Path(name) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
        ran = subprocess.run(
            [*ISOLATED, sys.executable, "-m", "tests.cluster.several_hosts", str(file), name],
            cwd=Path(__file__).parents[2],
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            capture_output=True,
            text=True,
            check=False,
            timeout=1500,
        )
        logs = "".join(log.read_text(errors="replace")[-2000:] for log in Path(name).glob("host*.log"))
        assert ran.returncode == 0, ran.stderr[-3000:] + logs
        seen: dict[str, Any] = json.loads((Path(name) / "found.json").read_text(encoding="utf-8"))
        return seen


def test_what_is_trained_and_served_on_hosts_survives_their_loss(found: dict[str, Any]) -> None:
    quiet, disturbed = found["quiet"], found["disturbed"]
    assert (quiet["code"], disturbed["code"]) == (0, 0), quiet["said"] + disturbed["said"]
    assert found["workers_on"] == ["host10", "host11", "host12"]
    resumed = [line["step"] for line in disturbed["lines"] if line.get("event") == "resumed"]
    assert len(resumed) >= 2
    assert [resumed[0] >= found["kept"][0], resumed[-1] >= found["kept"][1]] == [True, True], (resumed, found["kept"])
    losses = {name: [line["loss"] for line in step_lines(found[name]["lines"])] for name in ("quiet", "disturbed")}
    assert len(losses["quiet"]) == STEPS
    assert losses["disturbed"] == losses["quiet"]

    served = found["served"]
    assert served["code"] == 0, served["said"]
    assert all(served["replicas"].values()), served["replicas"]
    assert served["lost_http"] == [True, True]
    ends = [ending["how"] for ending in served["endings"]]
    assert not {"silent", "hung"} & set(ends)
    # a stream that had begun may tell of an error, and so may the ingress while Serve learns that a host is gone
    assert ends[-6:] == ["answered"] * 6
    assert ends[: served["marks"]["cut"]] == ["answered"] * served["marks"]["cut"]
    assert sum(how == "answered" for how in ends) >= 0.8 * len(ends)
