"""Configs of Ray's cluster launcher: Ray's own validator takes them, and every deployment finds its node."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import cluster
from cluster.modalities import RESOURCES
from serve_apps.config_files import load_serve_config
from serve_apps.proxy import PROXY_ENVIRONMENT

FOLDER = Path(cluster.__file__).parent / "launcher"
CLOUDS = ("aws", "gcp")


def launcher(name: str) -> dict[str, Any]:
    """A config as `ray up` has it, with Ray's defaults for what it does not say."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return prepare_config(yaml.safe_load(text))


@pytest.mark.parametrize("name", [*CLOUDS, "onprem"])
def test_ray_takes_it_and_tells_a_wrong_key(name: str) -> None:
    config = launcher(name)
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(config | {"max_wokers": 2})


@pytest.mark.parametrize("name", [*CLOUDS, "onprem"])
def test_every_node_asks_for_the_token_and_nobody_else_sees_the_dashboard(name: str) -> None:
    config = launcher(name)
    (head,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    (worker,) = [command for command in config["worker_start_ray_commands"] if "ray start" in command]
    ((variable, value),) = PROXY_ENVIRONMENT.items()
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token " in command
        assert f"{variable}={value} " in command
    assert "--dashboard-host=127.0.0.1" in head
    tokens = [place for place, source in config["file_mounts"].items() if source == "~/.ray/auth_token"]
    assert len(tokens) == 1
    assert any("chmod 600" in command for command in config["setup_commands"])
    assert {".env", "*.pem", "*.key"} <= set(config["rsync_exclude"])
    if name in CLOUDS:
        images = {config["docker"]["head_image"], config["docker"]["worker_image"]}
        assert all(f":{ray.__version__}-py311" in image for image in images)


@pytest.mark.parametrize("name", CLOUDS)
def test_each_deployment_has_nodes_of_its_own_kind_and_the_head_has_none(name: str) -> None:
    types = {kind: entry["resources"] for kind, entry in launcher(name)["available_node_types"].items()}
    served = load_serve_config("phi")
    parts = {"vision": served.clip, "audio": served.whisper, "text": served.phi, "ingress": served.ingress}
    for modality, part in parts.items():
        options = part.ray_actor_options
        asked = {"CPU": options.num_cpus, "GPU": options.num_gpus, **options.resources}
        fitting = [kind for kind, has in types.items() if all(has.get(key, 0) >= n for key, n in asked.items())]
        assert modality in fitting
        if modality in RESOURCES:
            assert fitting == [modality]
        assert "head" not in fitting
