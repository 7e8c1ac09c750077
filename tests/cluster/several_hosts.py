"""Training and serving on a Ray of three hosts, of which one loses its link and one ends meanwhile.

    unshare --pid --fork --mount-proc --net --kill-child python -m tests.cluster.several_hosts RECIPE FOLDER

Hosts are those of `tests.cluster.hosts`; the home folder is one that all of them mount. Trains the recipe on a quiet
cluster, and again while hosts are lost and come back; then serves what was trained while hosts are lost. Out:
`found.json` in the folder.
"""

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from cluster.ray_record import showing_token
from mmllm_core.bundle import Bundle
from mmllm_core.models.home import home
from serve_apps.builder import APP_NAME, CLIP, INGRESS, PHI, WHISPER, build
from serve_apps.config_files import load_serve_config
from tests.cluster.hosts import Host, lay_cable
from tests.serve_apps.conftest import recorded_speech
from tests.serve_apps.faults import MixedLoad
from tests.train_jobs.kept_checkpoints import kept_step, wait_for_kept_step
from tests.waiting import wait_for
from train_jobs.progress import read_metrics
from train_jobs.run_folders import LOG, runs_folder

PORT, HTTP_PORT = 6379, 8000
PATIENCE_S = 400
"""For what does not come on a machine that has other work too."""
QUICK = {  # Ray misses a host after about 10 s, sooner than by default
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
SERVED: dict[str, Any] = {
    "ui": False,
    "limits.request_timeout_s": 60,
    "ingress.cache_bytes": 0,
    "clip.cache_bytes": 0,
    "ingress.ray_actor_options.num_cpus": 0.55,
} | {
    f"{part}.{key}": value
    for part in ("clip", "whisper", "phi")
    for key, value in {"autoscaling": None, "num_replicas": 2, "threads": 1, "max_queued_requests": 64}.items()
}


class Cluster:
    """A Ray of three hosts, the first its head; each has room for one training worker and one replica of each model."""

    def __init__(self, folder: Path):
        lay_cable()
        self.hosts = [Host(10 + number, folder) for number in range(3)]
        self.head = self.hosts[0]
        self.address = f"{self.head.address}:{PORT}"
        self.boot(self.head)
        self.boot(*self.hosts[1:])

    def boot(self, *hosts: Host) -> None:
        """Start hosts and their Rays, and wait until they are nodes of the cluster."""
        for host in hosts:
            host.mend()
            host.boot()
            self._start_ray(host)
        self._wait_for_nodes(*hosts)

    def lose(self, host: Host, how: Callable[[], None]) -> float:
        """Cut a host off or end it, and wait until Ray misses it; the seconds that took."""
        began = time.monotonic()
        how()
        wait_for(lambda: host.address not in self.alive(), f"{host.name} to be missed", PATIENCE_S)
        return round(time.monotonic() - began, 1)

    def mend(self, host: Host) -> None:
        """Mend a link that was cut for so long that the host is missed: its Ray learns that, ends, and starts anew."""
        host.mend()
        wait_for(lambda: not host.command_lines("ray"), f"Ray on {host.name} to end", PATIENCE_S)
        self._start_ray(host)
        self._wait_for_nodes(host)

    def _wait_for_nodes(self, *hosts: Host) -> None:
        wanted = {host.address for host in hosts}
        wait_for(lambda: wanted <= self.alive(), f"{' and '.join(sorted(wanted))} to be nodes", PATIENCE_S)

    def _start_ray(self, host: Host) -> None:
        where = ("--head", "--port", str(PORT)) if host is self.head else ("--address", self.address)
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where),
            *("--node-ip-address", host.address, "--num-cpus", "1", "--object-store-memory", "150000000"),
            *("--resources", json.dumps({"vision": 1, "audio": 1, "text": 1})),
        ]
        if host is self.head:
            command += ["--include-dashboard=false"]
        host.start(*command)

    def alive(self) -> set[str]:
        """Addresses of the nodes that Ray believes to be there."""
        from ray._raylet import GcsClient

        try:
            nodes = GcsClient(address=self.address).get_all_node_info(timeout=5)
        except Exception:  # Ray's own, of many kinds, while the head starts
            return set()
        return {node.node_manager_address for node in nodes.values() if node.state == 0}


def train(cluster: Cluster, recipe: Path, name: str, disturb: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train on the cluster as a command on its head does, and tell what became of it."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    file = recipe.parent / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values | {"name": name}), encoding="utf-8")
    command = [sys.executable, "-m", "cluster.cli", "train", str(file)]
    driver = cluster.head.start(*command, RAY_ADDRESS=cluster.address)
    try:
        if disturb is not None:
            disturb(name)
        code = driver.wait(timeout=PATIENCE_S)
    finally:
        driver.kill()
    return {"code": code, "lines": read_metrics(runs_folder() / name / LOG), "said": cluster.head.said()[-3000:]}


def worker_hosts(cluster: Cluster) -> list[str]:
    """Names of the hosts on which training workers run."""
    return [host.name for host in cluster.hosts if host.command_lines("RayTrainWorker")]


def lose_hosts(cluster: Cluster, run: str, seen: dict[str, Any]) -> None:
    """While a run goes on: cut a link for a while, then end a host; both come back."""
    kept = home() / "ray" / run

    def resumed() -> list[int]:
        lines = read_metrics(runs_folder() / run / LOG)
        return [line["step"] for line in lines if line.get("event") == "resumed"]

    _, cut, ended = cluster.hosts
    wait_for_kept_step(kept, 1)
    seen["workers_on"] = worker_hosts(cluster)
    seen["kept"] = [kept_step(kept)]
    seen["missed_after_s"] = [cluster.lose(cut, cut.cut)]
    cluster.mend(cut)
    wait_for(resumed, "the run to go on", PATIENCE_S)
    wait_for_kept_step(kept, resumed()[0] + 1)
    seen["kept"].append(kept_step(kept))
    seen["missed_after_s"].append(cluster.lose(ended, ended.end))
    cluster.boot(ended)
    wait_for(lambda: len(resumed()) >= 2, "the run to go on again", PATIENCE_S)


def serve(bundle: Path, folder: Path) -> None:
    """On the head: serve a bundle until the folder holds `stop`, and ask it all the while."""
    import ray
    from ray import serve

    ray.init(address=f"{os.environ['RAY_ADDRESS']}", log_to_driver=False, logging_level="ERROR")
    # The head, through which all is asked, has no room for the replica that answers HTTP: that is lost too.
    ray.get(ray.util.placement_group([{"CPU": 0.5, "node:__internal_head__": 0.001}]).ready())
    config = load_serve_config("embedded", SERVED | {"http.port": HTTP_PORT})
    serve.start(http_options={"host": "127.0.0.1", "port": HTTP_PORT})
    serve.run(build(config, bundle), name=APP_NAME, route_prefix="/")
    load = MixedLoad(config.http.base_url, Bundle.open(bundle).info.name, recorded_speech(), retries=4)

    async def ask() -> None:
        while not (folder / "stop").exists():
            await load.closed(6, 3)
            states = serve.status().applications[APP_NAME].deployments
            whole = all(states[name].replica_states.get("RUNNING", 0) == 2 for name in (CLIP, WHISPER, PHI))
            written = {"endings": [asdict(ending) for ending in load.endings], "whole": whole}
            (folder / "served.new").write_text(json.dumps(written), encoding="utf-8")
            (folder / "served.new").rename(folder / "served.json")

    asyncio.run(ask())
    serve.shutdown()


def answers_http(host: Host) -> bool:
    """Whether the replica that answers HTTP is there."""
    return bool(host.command_lines(f"ray::ServeReplica:{APP_NAME}:{INGRESS}"))


def serve_and_lose(cluster: Cluster, bundle: Path, folder: Path) -> dict[str, Any]:
    """Requests while the host that answers HTTP is cut off and comes back, and while the one that took over ends."""
    command = [sys.executable, "-m", "tests.cluster.several_hosts", "--serve", str(bundle), str(folder)]
    driver = cluster.head.start(*command, RAY_ADDRESS=cluster.address)
    served = folder / "served.json"

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(served.read_text(encoding="utf-8")) if served.exists() else {}
        return found

    def answered_since(n: int) -> bool:
        return len(read().get("endings", ())) >= n + 12 and read()["whole"]

    try:
        wait_for(lambda: answered_since(0), "the first answers", PATIENCE_S)
        replicas = {host.name: len(host.command_lines("ray::ServeReplica")) for host in cluster.hosts}
        cut, ended = sorted(cluster.hosts[1:], key=answers_http, reverse=True)
        lost_http = [answers_http(cut)]
        marks = {"cut": len(read()["endings"])}
        missed_after_s = [cluster.lose(cut, cut.cut)]
        wait_for(lambda: answered_since(marks["cut"]), "answers without a host", PATIENCE_S)
        cluster.mend(cut)
        marks["ended"] = len(read()["endings"])
        lost_http.append(answers_http(ended))
        missed_after_s.append(cluster.lose(ended, ended.end))
        wait_for(lambda: answered_since(marks["ended"]), "answers without the other host", PATIENCE_S)
        (folder / "stop").touch()
        code = driver.wait(timeout=PATIENCE_S)
    finally:
        driver.kill()
    seen = {"replicas": replicas, "marks": marks, "missed_after_s": missed_after_s, "lost_http": lost_http}
    return {"code": code, **seen, **read(), "said": cluster.head.said()[-3000:]}


def main(recipe: Path, folder: Path) -> None:
    """All of it, one after another."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ |= QUICK | {"RAY_USAGE_STATS_ENABLED": "0"}
    with showing_token(token):
        cluster = Cluster(folder)
        found: dict[str, Any] = {"quiet": train(cluster, recipe, "quiet")}
        seen: dict[str, Any] = {}
        found["disturbed"] = train(cluster, recipe, "disturbed", lambda run: lose_hosts(cluster, run, seen))
        found |= seen
        found["served"] = serve_and_lose(cluster, Bundle.latest().folder, folder)
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
