"""`mmllm import` and `mmllm export`: options in, a bundle or a folder out; the work is done in `mmllm_core.interop`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mmllm_core.config import NAME_PATTERN, Dtype
from mmllm_core.errors import ConfigError, ExportError, WeightsError
from mmllm_core.interop import ExportFormat

if TYPE_CHECKING:
    from mmllm_core.config import HubSource

importing = typer.Typer(help="Make a bundle of a checkpoint in another format.", no_args_is_help=True)
console = Console()


@importing.command("llava")
def import_llava_checkpoint(
    checkpoint: Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="A folder, or a repository on the hub.")],
    name: Annotated[str | None, typer.Option(help="Of the bundle; the checkpoint's own if not given.")] = None,
    profile: Annotated[str, typer.Option(help="Whose ears it gets, and how its LM is loaded.")] = "phi",
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag on the hub.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file to use instead of the checkpoint's.")] = None,
    latest: Annotated[bool, typer.Option(help="Let `mmllm serve` start from it.")] = True,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite a bundle of that name.")] = False,
) -> None:
    """Import a LLaVA checkpoint in Hugging Face format as a bundle."""
    from mmllm_core.bundle import bundles_folder
    from mmllm_core.models.profile import load_profile

    chosen = load_profile(profile)
    template = _read_template(chat_template) if chat_template else None
    name = _bundle_name(name or Path(checkpoint).resolve().name)
    if (bundles_folder() / name).exists() and not replace:
        raise ConfigError(f"{bundles_folder() / name}: exists already: give another --name, or --replace")
    with console.status(f"importing {checkpoint}"):
        folder, source = _locate(checkpoint, revision)
        from mmllm_core.interop.llava import import_llava

        bundle = import_llava(
            folder, profile=chosen, name=name, source=source, chat_template=template, make_latest=latest
        )
    console.print(bundle.folder, soft_wrap=True)


def export(
    format_: Annotated[ExportFormat, typer.Option("--format", help="What to write.")],
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle; the last one if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make, for llava-hf and merged-lm.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the new bundle, for merged-bundle.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the LM; the bundle's own if not given.")] = None,
    inexact_ids: Annotated[
        bool, typer.Option("--inexact-ids", help="Accept a chat template that a processor tokenizes otherwise.")
    ] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Upload to this repository of the hub.")] = None,
    public: Annotated[bool, typer.Option("--public", help="If --push makes the repository: public.")] = False,
) -> None:
    """Write a bundle in a format that plain transformers opens, or as a bundle with its LM merged."""
    from mmllm_core.bundle import Bundle

    makes_bundle = format_ == "merged-bundle"
    if makes_bundle and out is not None:
        raise ExportError("--out: a merged bundle is kept among the bundles: name it with --name")
    if not makes_bundle and (out is None or name is not None):
        raise ExportError(f"--format {format_}: say where to write with --out, and give no --name")
    opened = Bundle.open(bundle) if bundle else Bundle.latest()
    from mmllm_core.interop.export import export_llava, export_merged_bundle, export_merged_lm
    from mmllm_core.interop.push import ensure_repository, push_folder

    if push:
        ensure_repository(push, private=not public)
    with console.status(f"exporting '{opened.info.name}' as {format_}"):
        if makes_bundle or out is None:
            merged = export_merged_bundle(opened, _bundle_name(name or f"{opened.info.name}-merged"), dtype=dtype)
            folder = merged.folder
        else:
            folder = out
            if format_ == "llava-hf":
                export_llava(opened, folder, dtype=dtype, exact_ids=not inexact_ids)
            else:
                export_merged_lm(opened, folder, dtype=dtype)
    console.print(folder, soft_wrap=True)
    if push:
        with console.status(f"uploading to {push}"):
            url = push_folder(folder, push)
        console.print(url, soft_wrap=True)


def _locate(checkpoint: str, revision: str | None) -> tuple[Path, "HubSource | None"]:
    """The checkpoint's folder, and its pinned source where it comes from the hub."""
    from mmllm_core.models.resolve import pin, resolve

    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if revision:
            raise ConfigError(f"--revision: '{checkpoint}' is a folder and has none")
        return folder, None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) or checkpoint.startswith("."):
        raise WeightsError(f"{checkpoint}: no such folder, and no name of a repository on the hub (owner/name)")
    source = pin(checkpoint, revision)
    return resolve(source), source


def _bundle_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(f"--name: '{name}' cannot name a bundle: use letters, digits, '.', '_' and '-'")
    return name


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the chat template cannot be read: {error}") from error
