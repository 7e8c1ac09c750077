"""`mmllm k8s`: render the manifests under `k8s/`, check them, and see what would change. Nothing is applied.

Options in, YAML or a line a finding out; the work is done by `cluster.k8s`.
"""

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.console import Console

from mmllm_core.errors import ConfigError, EnvironmentLack

if TYPE_CHECKING:
    from cluster.k8s.render import Target

k8s_app = typer.Typer(help="Kubernetes manifests: render, check and compare them.")
console = Console(soft_wrap=True)

Name = Annotated[
    str, typer.Argument(metavar="TARGET", help="An overlay such as prod-gpu, a job such as jobs/align, or a folder.")
]
With = Annotated[list[str] | None, typer.Option("--with", help="A component on top; several by several --with.")]
Folder = Annotated[Path | None, typer.Option("--folder", help="The folder k8s; this checkout's if not given.")]
Registry = Annotated[str | None, typer.Option(help="Where images are, such as registry.example.com/mmllm.")]
Tag = Annotated[str | None, typer.Option(help="Of the images; this version's if not given.")]


@k8s_app.command()
def render(
    name: Name,
    with_: With = None,
    folder: Folder = None,
    registry: Registry = None,
    tag: Tag = None,
    ground: Annotated[
        bool, typer.Option("--ground", help="All but Ray's clusters: what jobs want that make the first bundle.")
    ] = False,
) -> None:
    """Print the manifests of TARGET: `mmllm k8s render prod-gpu --registry ... | kubectl apply --server-side -f -`."""
    from cluster.k8s.manifests import CLUSTER_AT, read_manifests
    from cluster.k8s.render import render_text

    text = render_text(_target(name, with_, folder, registry, tag))
    if ground:
        kept = [m for m in read_manifests(text, name) if m["kind"] not in CLUSTER_AT]
        text = yaml.safe_dump_all(kept, width=10_000)
    print(text, end="")


@k8s_app.command()
def validate(
    name: Annotated[str | None, typer.Argument(metavar="[TARGET]", help="All overlays and jobs if not given.")] = None,
    with_: With = None,
    folder: Folder = None,
    crds: Annotated[
        Path | None,
        typer.Option(envvar="MMLLM_KUBERAY_CRDS", help="Folder or file of KubeRay's CRDs, which are not shipped."),
    ] = None,
) -> None:
    """Check manifests without a cluster: schemas, KubeRay's rules, security, network policies, and our own names."""
    from cluster.k8s.render import default_root, jobs, overlays
    from cluster.k8s.render import render as rendered
    from cluster.k8s.schemas import HOW_TO_GET_CRDS, KUBERAY_VERSION, KUBERNETES_VERSION
    from cluster.k8s.validation import context_of
    from cluster.k8s.validation import validate as findings_of

    root = folder or default_root()
    names = [name] if name else [*overlays(root), *(f"jobs/{job}" for job in jobs(root))]
    if not names:
        raise ConfigError(f"there are no manifests in {root}: name the folder k8s of a checkout by --folder")
    wrong = 0
    for each in names:
        target = _target(each, with_, folder)
        manifests = rendered(target)
        found = findings_of(manifests, context=context_of(target, manifests), crds=crds)
        wrong += len(found)
        for finding in found:
            console.print(f"{each}: {finding}", markup=False, highlight=False)
        if not found:
            console.print(f"{each}: {len(manifests)} objects, nothing wrong", markup=False, highlight=False)
    checked = f"KubeRay {KUBERAY_VERSION}'s" if crds else "not KubeRay's, whose CRDs --crds names"
    console.print(f"schemas: Kubernetes {KUBERNETES_VERSION}'s; {checked}", markup=False, highlight=False)
    if not crds:
        console.print(f"get them by: {HOW_TO_GET_CRDS}", markup=False, highlight=False)
    if wrong:
        raise typer.Exit(1)


@k8s_app.command()
def diff(
    name: Name,
    other: Annotated[
        str | None,
        typer.Argument(metavar="[OTHER]", help="A target, or a file of manifests; what the cluster has if not given."),
    ] = None,
    with_: With = None,
    folder: Folder = None,
    registry: Registry = None,
    tag: Tag = None,
) -> None:
    """Show what TARGET would change: on the cluster that kubectl speaks to, or against OTHER. Exit code 1 if so."""
    from cluster.k8s.comparison import difference
    from cluster.k8s.manifests import read_manifests
    from cluster.k8s.render import render as rendered
    from cluster.k8s.render import render_text

    target = _target(name, with_, folder, registry, tag)
    if other is None:
        raise typer.Exit(_diff_with_cluster(render_text(target)))
    if other.endswith((".yaml", ".yml")):
        try:
            before = read_manifests(Path(other).read_text(), other)
        except OSError as error:
            raise ConfigError(f"{other}: cannot be read: {error.strerror}") from error
    else:
        before = rendered(_target(other, None, folder))
    lines = list(difference(before, rendered(target)))
    for line in lines:
        print(line)
    if lines:
        raise typer.Exit(1)


def _target(
    name: str, with_: list[str] | None, folder: Path | None, registry: str | None = None, tag: str | None = None
) -> "Target":
    from cluster.k8s.render import default_root, find_target

    return find_target(folder or default_root(), name, with_ or [], registry, tag)


def _diff_with_cluster(text: str) -> int:
    """kubectl's own: the API server fills in defaults, so that only real differences show."""
    done = subprocess.run(["kubectl", "diff", "--server-side", "-f", "-"], input=text, text=True, check=False)
    if done.returncode > 1:
        raise EnvironmentLack("kubectl cannot compare with a cluster: see above, or give OTHER to compare with")
    return done.returncode
