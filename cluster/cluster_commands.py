"""`mmllm cluster`: a local Ray cluster of several nodes: up, looked at, down. The work is `cluster.local_cluster`'s."""

import os
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.local import running_ray
from cluster.local_cluster import Shape, hold, local_cluster, start, stop
from cluster.ray_record import RunningRay
from mmllm_core.errors import EnvironmentLack

cluster_app = typer.Typer(help="A local Ray cluster of several nodes.", no_args_is_help=True)
console = Console()


@cluster_app.command()
def up(
    workers: Annotated[int, typer.Option(min=1, help="Worker nodes; the head runs no work of its own.")] = 2,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs that Ray counts on each worker; the cores shared out, if not given.")
    ] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Be the cluster, and end it with Ctrl-C.")] = False,
) -> None:
    """Start a cluster in the background: it asks for a token, and only this machine sees its dashboard."""
    from train_jobs.accelerators import usable_cores

    shape = Shape(workers, cpus or max(1, usable_cores() // workers))
    if stay:
        hold(shape, _tell)
        return
    with console.status(f"starting a head and {workers} worker nodes"):
        found = start(shape)
    _tell(found)
    console.print("end it: mmllm cluster down", highlight=False)


def _tell(found: RunningRay) -> None:
    console.print(
        f"Ray: {found.address}   dashboard: {found.dashboard}   token: {found.token_file}\n"
        f"on it:  RAY_ADDRESS={found.address} mmllm train ...   or   mmllm submit train ...",
        highlight=False,
        soft_wrap=True,
    )


@cluster_app.command()
def status() -> None:
    """Print the nodes of the local cluster, or of the one that RAY_ADDRESS names, and how much of each is in use."""
    from cluster.modalities import RESOURCES

    found = local_cluster()
    if found and not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_ADDRESS"] = found.address
    if not os.environ.get("RAY_ADDRESS"):
        raise EnvironmentLack("no cluster of this MMLLM_HOME runs here: start one with 'mmllm cluster up'")
    with running_ray():
        import ray
        from ray._private.state import available_resources_per_node

        nodes, free = ray.nodes(), available_resources_per_node()
    counted = ("CPU", "GPU", *RESOURCES)
    table = Table("node", "address", "role", "state", *counted, box=None, padding=(0, 1))
    for node in sorted(nodes, key=lambda node: (not node["Alive"], node["NodeID"])):
        total, left = node["Resources"], free.get(node["NodeID"], {})
        table.add_row(
            node["NodeID"][:8],
            node["NodeManagerAddress"],
            "head" if "node:__internal_head__" in total else "worker",
            "alive" if node["Alive"] else "dead",
            *(f"{total[name] - left.get(name, 0):g}/{total[name]:g}" if name in total else "-" for name in counted),
        )
    console.print(table, highlight=False)
    if found and found.address == os.environ["RAY_ADDRESS"]:
        console.print(f"dashboard: {found.dashboard}", highlight=False)


@cluster_app.command()
def down() -> None:
    """End the local cluster and everything that runs on it."""
    with console.status("ending the cluster"):
        ended = stop()
    console.print(f"the cluster at {ended.address} has ended", highlight=False)
