"""The service on a Ray whose autoscaler starts and ends nodes of each modality, as it would on machines.

    unshare --pid --fork --mount-proc --net --kill-child python -m tests.serve_apps.autoscaled_nodes BUNDLE OUT PART...

Parts are `vision` and `audio`, of which none is there until it is asked for, and `loss`: a node that ends under load.

Ray's autoscaler v2 runs with the provider that Ray has for this: each "machine" is a raylet of its own, with a
modality's resource and nothing else. Nodes outlive what started them, so this runs in namespaces of its own and ends
with them. Out: JSON of what was asked, how that ended, and how many nodes of each kind there were meanwhile.
"""

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from cluster.ray_record import showing_token
from mmllm_core.bundle import Bundle
from serve_apps.builder import APP_NAME, build
from serve_apps.config_files import load_serve_config
from tests.serve_apps.conftest import free_port, recorded_speech
from tests.serve_apps.faults import MixedLoad
from tests.waiting import wait_for

KINDS = ("vision", "audio", "text")
IDLE_S = 4.0
"""After which a node without work ends."""
HEAD = "f" * 51 + "00000"
"""The head's node id, which Ray's provider wants to know before there is a head."""

CONFIG: dict[str, Any] = {
    "ui": False,
    "limits.request_timeout_s": 200,
    "ingress.cache_bytes": 0,
    "clip.cache_bytes": 0,
    "clip.autoscaling": {"min_replicas": 0, "max_replicas": 2, "target_images": 16},
    "whisper.autoscaling": {"min_replicas": 0, "max_replicas": 2, "target_seconds": 30},
    "phi.autoscaling": None,
    "whisper.threads": 1,
    "phi.threads": 1,
    "phi.kv_cache_bytes": 60_000_000,
} | {
    f"{part}.autoscaling.{key}": value
    for part in ("clip", "whisper")
    for key, value in {
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 3,
        "look_back_s": 2,
        "metrics_interval_s": 0.5,
    }.items()
}
"""Overrides of the embedded config: nobody waits for images and speech, and what is not needed goes soon."""


def autoscaling(gcs_address: str) -> dict[str, Any]:
    """What Ray's autoscaler is told: a head for HTTP, a node for text, and none of the others until they are needed."""
    at_most = {"vision": (0, 2), "audio": (0, 2), "text": (1, 1)}
    types: dict[str, Any] = {
        kind: {"resources": {"CPU": 1, kind: 1}, "node_config": {}, "min_workers": least, "max_workers": most}
        for kind, (least, most) in at_most.items()
    }
    types["ray.head.default"] = {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "autoscaled",
        "max_workers": 8,
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "head_node_id": HEAD,
            "gcs_address": gcs_address,
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


@contextmanager
def autoscaled_ray(folder: Path) -> Iterator[None]:
    """Run the block on a head with the autoscaler; files go to a folder."""
    import ray

    port = free_port()
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(autoscaling(f"127.0.0.1:{port}")), encoding="utf-8")
    token = folder / "token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ |= {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"),
        *("--port", str(port), "--node-ip-address", "127.0.0.1", "--num-cpus", "1"),
        *("--min-worker-port", "0", "--max-worker-port", "0", "--object-store-memory", "150000000"),
        *("--autoscaling-config", str(config), "--temp-dir", str(folder / "ray")),
    ]
    head_only = {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    with showing_token(token), (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=os.environ | head_only, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: _listens(port) or head.poll() is not None, "the head", 60)
            ray.init(address=f"127.0.0.1:{port}", log_to_driver=False, logging_level="ERROR")
            yield
            ray.shutdown()
        finally:
            head.terminate()
            head.wait(timeout=60)


class NodeWatch:
    """How many nodes of each kind there are, sampled as time goes."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []
        self._ended = threading.Event()
        self._began = time.monotonic()
        threading.Thread(target=self._watch, name="watch-nodes", daemon=True).start()

    def now(self) -> dict[str, int]:
        """By kind, those that are alive."""
        return {kind: len(nodes_of(kind)) for kind in KINDS}

    def most_since(self, first: int) -> dict[str, float]:
        """The most of each kind since a sample."""
        return {kind: max((sample[kind] for sample in self.samples[first:]), default=0) for kind in KINDS}

    def end(self) -> None:
        """Take no more samples."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self.samples.append({"seconds": round(time.monotonic() - self._began, 1), **self.now()})


def nodes_of(kind: str) -> list[dict[str, Any]]:
    """Living nodes that offer a modality's resource."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and kind in node["Resources"]]


def end_node(node: dict[str, Any]) -> None:
    """Kill a node and all that runs on it, without a warning."""
    port = node["NodeManagerPort"]
    (raylet,) = (
        psutil.Process(c.pid)
        for c in psutil.net_connections("tcp")
        if c.status == "LISTEN" and c.laddr.port == port and c.pid
    )
    for process in [raylet, *raylet.children(recursive=True)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def while_text_is_asked(load: MixedLoad, other: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Await something while text is asked for again and again."""
    done = asyncio.ensure_future(other)
    while not done.done():
        await load.closed(2, 1)
    return await done


async def rise_and_fall(load: MixedLoad, modality: str, watch: NodeWatch) -> dict[str, Any]:
    """One request where no node can take it, and nothing afterwards."""
    first = len(watch.samples)
    (ending,) = await load.closed(1, 1)
    up = watch.most_since(first)
    await asyncio.to_thread(wait_for, lambda: not nodes_of(modality), f"{modality} to have no node")
    return {"ending": asdict(ending), "up": up, "most": watch.most_since(first), "after": watch.now()}


async def lose_a_node(load: MixedLoad) -> dict[str, Any]:
    """Sixty requests for images, and the end of a node meanwhile."""
    loaded = asyncio.create_task(load.closed(60, 6))
    await asyncio.to_thread(wait_for, lambda: len(load.endings) >= 6, "six images to be answered")
    ended = nodes_of("vision")[0]
    end_node(ended)
    await loaded
    left = [node["NodeID"] for node in nodes_of("vision")]
    return {"node": ended["NodeID"], "endings": [asdict(ending) for ending in load.endings], "nodes": left}


async def observe(url: str, model: str, parts: list[str]) -> dict[str, Any]:
    """The parts one after another, with requests for text all the while."""
    speech = recorded_speech()
    watch = NodeWatch()
    text = MixedLoad(url, model, speech, kinds=("text",), seed=1)
    await text.closed(2, 1)
    found: dict[str, Any] = {"at_rest": watch.now()}
    for part in parts:
        if part == "loss":
            doing = lose_a_node(MixedLoad(url, model, speech, kinds=("image",), seed=3, retries=4))
        else:
            kind = {"vision": "image", "audio": "speech"}[part]
            doing = rise_and_fall(MixedLoad(url, model, speech, kinds=(kind,), seed=2), part, watch)
        found[part] = await while_text_is_asked(text, doing)
    watch.end()
    return found | {"text": [asdict(ending) for ending in text.endings], "samples": watch.samples}


def main(bundle: Path, out: Path, parts: list[str]) -> None:
    """Run the parts and write what was found."""
    from ray import serve

    with autoscaled_ray(out.parent):
        port = free_port()
        config = load_serve_config("embedded", CONFIG | {"http.port": port})
        # Nodes share this machine's ports, so that a proxy of each would take callers along as its node ends.
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(config, bundle), name=APP_NAME, route_prefix="/")
        found = asyncio.run(observe(config.http.base_url, Bundle.open(bundle).info.name, parts))
        out.write_text(json.dumps(found), encoding="utf-8")
        serve.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
