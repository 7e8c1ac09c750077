"""`mmllm space deploy`: a Hugging Face Space in one command. Options in, a Space or its folder out.

The folder is `serve_apps.space.folder`'s work, the upload `mmllm_core.interop.push`'s.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mmllm_core.errors import ConfigError

space_app = typer.Typer(help="The assistant as a Hugging Face Space.", no_args_is_help=True)
console = Console()


@space_app.callback()
def _space() -> None:
    """Say that deploy is a command of its own."""


@space_app.command()
def deploy(
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="The Space; it is made where there is none.")],
    bundle: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|OWNER/NAME", help="What it runs: a bundle here, or on the hub; the last one if not given."
        ),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="It runs nothing and asks this service instead.")] = None,
    model: Annotated[str | None, typer.Option(help="Of that service; the first that it serves.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Of that service; kept as a secret, and used for whoever sees the Space.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="By the hub's name, such as zero-a10g; a new Space's own if not given.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="If the Space is made: for everyone to see.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder, and upload nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to make, for --dry-run.")] = None,
) -> None:
    """Make or renew a Space that runs a bundle, or asks a service."""
    from mmllm_core.bundle import Bundle
    from mmllm_core.interop.push import SpaceState, ensure_repository, push_folder, set_up_space
    from serve_apps.space.folder import write_space
    from serve_apps.space.settings import VARIABLES, SpaceSettings, require_repository

    if dry_run == (out is None):
        raise ConfigError("--dry-run writes the folder that --out names: give both or none")
    require_repository(repo)
    on_hub = bundle is not None and not Path(bundle).expanduser().is_dir()
    settings = SpaceSettings.of_options(
        bundle=bundle if on_hub else None, base_url=base_url, model=model, api_key=api_key
    )
    if bundle is not None and base_url is not None:
        raise ConfigError("--bundle is run there and --base-url is asked instead: give one of them")
    carried: Bundle | None = None
    if on_hub:
        require_repository(str(bundle))
    elif base_url is None:
        carried = Bundle.open(Path(bundle).expanduser()) if bundle else Bundle.latest()
    told = {VARIABLES[field]: value for field, value in settings.model_dump().items()}
    secrets = {name: told.pop(name) for name in (VARIABLES["api_key"],)}
    title = repo.partition("/")[2]
    if out is not None:
        write_space(out, title, carried)
        console.print(out, soft_wrap=True)
        for name, value in told.items():
            if value is not None:
                console.print(f"variable {name}={value}", markup=False, highlight=False, soft_wrap=True)
        return
    ensure_repository(repo, private=not public, kind="space")
    with console.status(f"uploading to {repo}"), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "space"
        write_space(folder, title, carried)
        set_up_space(repo, SpaceState(told, secrets, hardware))
        url = push_folder(folder, repo, message="Deploy from mmllm", kind="space")
    console.print(url, soft_wrap=True)
