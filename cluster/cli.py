"""The `mmllm` command. Options in, one readable line out when something is wrong; the work is done elsewhere."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.benchmark_command import benchmark
from cluster.chat_command import chat
from cluster.cluster_commands import cluster_app
from cluster.data_commands import data
from cluster.evaluate_command import evaluate
from cluster.features_commands import features_app
from cluster.interop_commands import export, importing
from cluster.k8s_commands import k8s_app
from cluster.keys_commands import keys_app, keys_file
from cluster.local import Verbose, quieten
from cluster.plan_command import plan_app
from cluster.report_command import report
from cluster.space_command import space_app
from cluster.spoken_command import evaluate_spoken
from cluster.submit_command import submit_app
from cluster.top_command import top
from cluster.train_command import train
from cluster.ui_command import ui
from mmllm_core.errors import MmllmError

if TYPE_CHECKING:
    from mmllm_core.bundle import Bundle

app = typer.Typer(help="CLIP sees, Whisper hears, a Phi model answers.", no_args_is_help=True, add_completion=False)
app.add_typer(data, name="data")
app.add_typer(importing, name="import")
app.command()(benchmark)
app.command()(chat)
app.command()(evaluate)
app.command()(evaluate_spoken)
app.command()(export)
app.command()(report)
app.command()(top)
app.command()(train)
app.command()(ui)
app.add_typer(cluster_app, name="cluster")
app.add_typer(features_app, name="features")
app.add_typer(k8s_app, name="k8s")
app.add_typer(keys_app, name="keys")
app.add_typer(plan_app, name="plan")
app.add_typer(space_app, name="space")
app.add_typer(submit_app, name="submit")
console = Console()

Port = Annotated[int, typer.Option(help="Port of the HTTP service.", min=1, max=65535)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings of the recipe to change, as key=value.")]


@app.command()
def demo(
    port: Port = 8000,
    short: Annotated[bool, typer.Option("--short", help="Train briefly: shows that every part works.")] = False,
    stay: Annotated[bool, typer.Option(help="Leave the assistant running at the end.")] = True,
    verbose: Verbose = False,
) -> None:
    """Fetch, train, report, serve and ask: the whole way on this machine."""
    from cluster.demo import DemoOptions, run_demo

    run_demo(DemoOptions(port, short, stay, verbose))


@app.command()
def embed(
    recipe: Annotated[str, typer.Argument(help="Whose images, and whose profile's CLIP.")] = "embedded-instruct",
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")] = False,
    check: Annotated[bool, typer.Option(help="Read and check what is stored of the images already.")] = True,
    verbose: Verbose = False,
) -> None:
    """Put the CLIP features of a recipe's images into the feature store: exactly those that are missing."""
    from cluster.local import local_ray
    from mmllm_core.config import parse_overrides
    from train_jobs.recipe import load_training_recipe

    loaded = load_training_recipe(recipe, parse_overrides(overrides or []))
    from train_jobs.embed_images import EmbedOptions, embed_recipe

    with local_ray(verbose=verbose):
        done = embed_recipe(loaded, EmbedOptions(workers=workers, skip_broken=skip_broken, verify=check))
    for problem in done.broken:
        console.print(f"left out: {problem}", markup=False, highlight=False)
    console.print(f"{done.new} new features, {done.stored} stored already, {len(done.broken)} left out")


@app.command()
def serve(
    profile: Annotated[str, typer.Option(help="embedded, phi, or a serve config's YAML file.")] = "embedded",
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle; the last one if not given.")] = None,
    port: Annotated[int | None, typer.Option(help="Instead of the config's own port.", min=1, max=65535)] = None,
    host: Annotated[
        str | None, typer.Option(help="Instead of the config's own; others than loopback need keys.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, which callers need then.")] = None,
    proxy: Annotated[str | None, typer.Option(help="Instead of the config's own: serve, or haproxy (Linux).")] = None,
    verbose: Verbose = False,
) -> None:
    """Serve a bundle: the API under /v1 and the chat page at /."""
    from cluster.local import local_ray
    from cluster.server import local_config, require_devices, require_free_port, serving, wait_for_ever
    from serve_apps.haproxy import proxies_of

    given = {"access.keys_file": keys and str(keys_file(keys)), "http.host": host, "http.proxy": proxy}
    config = local_config(profile, port, {name: value for name, value in given.items() if value})
    require_free_port(config.http.host, config.http.port)
    require_devices(config)
    opened = _bundle_for(profile, bundle)
    with ExitStack() as stack:
        with console.status(f"deploying CLIP, Whisper and Phi of '{opened.info.name}'"):
            proxies = stack.enter_context(proxies_of(config.http, config.limits))
            stack.enter_context(local_ray(verbose=verbose, proxies=proxies))
            url = stack.enter_context(serving(opened, config))
        console.print(f"Chat page: {url}   API: {url}/v1   model: {opened.info.name}   Ctrl-C ends all of it.")
        wait_for_ever()


@app.command()
def reload(
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle; the last one if not given.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Name that it shall answer under; the first that is served.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Let another bundle of the same base answer in a running service, without a restart."""
    from cluster.local import running_ray
    from cluster.server import reload_bundle
    from mmllm_core.bundle import Bundle

    opened = Bundle.open(bundle) if bundle else Bundle.latest()
    with running_ray(verbose=verbose), console.status(f"loading '{opened.info.name}' beside what is served"):
        name = reload_bundle(opened, model)
    console.print(f"model {name} answers by bundle '{opened.info.name}'")


@app.command()
def doctor(port: Port = 8000) -> None:
    """Say what this machine has, and what each lack costs."""
    from cluster.doctor import examine

    marks = {"ok": "[green]ok[/green]", "lack": "[yellow]lacks[/yellow]", "stop": "[red]stops[/red]"}
    table = Table("", "", "found", "what it costs, and the mend", box=None, padding=(0, 2))
    stops = 0
    for check in examine(port):
        stops += check.state == "stop"
        table.add_row(marks[check.state], check.name, check.found, check.cost)
    console.print(table)
    if stops:
        raise typer.Exit(1)


def main() -> None:
    """Run the command; a foreseen error is one line on stderr."""
    quieten()
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except MmllmError as error:
        Console(stderr=True).print(f"[bold red]mmllm:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a wrong option, told by the parser
            error.show()
            sys.exit(error.exit_code)
        raise


def _bundle_for(profile: str, folder: Path | None) -> "Bundle":
    """The bundle to serve; a profile with an aligned checkpoint imports it once."""
    from mmllm_core.bundle import Bundle, bundles_folder
    from mmllm_core.models.profile import load_profile, profile_names
    from mmllm_core.models.resolve import resolve

    if folder:
        return Bundle.open(folder)
    checkpoint = load_profile(profile).aligned_checkpoint if profile in profile_names() else None
    if checkpoint is None:
        return Bundle.latest()
    name = checkpoint.repo.rpartition("/")[2]
    if (bundles_folder() / name).is_dir():
        return Bundle.open(bundles_folder() / name)
    from mmllm_core.interop.llava import import_llava

    with console.status(f"importing {checkpoint.repo}, once"):
        return import_llava(
            resolve(checkpoint), profile=load_profile(profile), name=name, source=checkpoint, make_latest=False
        )


if __name__ == "__main__":
    main()
