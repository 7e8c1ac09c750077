"""`mmllm features`: what the feature store holds, whether it is whole, and what can go.

Options in, a table out; the work is done by `mmllm_core.data.feature_upkeep`. Knows which bundles of this machine use
which encoder.
"""

import json
import sys
from collections import defaultdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from mmllm_core.errors import BundleError, FeatureStoreError
from mmllm_core.models.home import features_folder

features_app = typer.Typer(help="What the feature store holds, whether it is whole, and what can go.")
console = Console() if sys.stdout.isatty() else Console(width=1_000)  # a pipe wants a line a row

Location = Annotated[
    str | None, typer.Option("--store", help="Folder or URL; by default MMLLM_FEATURES, else the home's own.")
]


@features_app.command("list")
def list_features(store: Location = None) -> None:
    """Show what is stored of each encoder, and which bundles use it."""
    from mmllm_core.data.feature_upkeep import summarise

    location = store or features_folder()
    used = bundles_by_fingerprint()
    table = Table(
        Column("encoder", no_wrap=True),
        "images",
        "size",
        "features of an image",
        "shards",
        "used by",
        box=None,
        padding=(0, 2),
    )
    for found in summarise(location):
        shapes = " or ".join(f"{rows} x {columns}" for rows, columns in sorted(found.shapes))
        users = escape(", ".join(used[found.fingerprint]) or "no bundle here")
        table.add_row(
            found.fingerprint, f"{len(found.keys):,}", _size(found.n_bytes), shapes, str(found.n_shards), users
        )
    console.print(escape(f"feature store {location}"), highlight=False)
    console.print(table if table.row_count else "  nothing is stored", highlight=False)


@features_app.command()
def verify(
    store: Location = None,
    remove: Annotated[bool, typer.Option("--remove", help="Drop what is damaged, to be computed again.")] = False,
) -> None:
    """Read and check every stored feature; the exit code is 1 if any is damaged."""
    from mmllm_core.data import feature_upkeep

    location = store or features_folder()
    with console.status("checking") as status:
        found = feature_upkeep.verify(
            location, remove=remove, progress=lambda done, total: status.update(f"checked {done} of {total} shards")
        )
    if found.damage:
        table = Table(Column("shard", overflow="fold"), "what is wrong", box=None, padding=(0, 2))
        for damage in found.damage:
            table.add_row(damage.name, escape(damage.reason))
        console.print(table, highlight=False)
        fate = "removed: run 'mmllm embed RECIPE' to compute it again" if remove else "never used: --remove drops it"
        console.print(f"{len(found.damage)} of {found.n_shards} shards are damaged; the damage is {fate}")
        raise typer.Exit(1)
    console.print(f"{found.n_rows:,} rows in {found.n_shards} shards ({_size(found.n_bytes)}) are whole")


@features_app.command()
def gc(
    store: Location = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Keep this encoder's features and remove the others'; may be repeated.")
    ] = None,
    unused: Annotated[
        bool, typer.Option("--unused", help="Remove features of encoders that no bundle on this machine uses.")
    ] = False,
    min_age_hours: Annotated[
        float, typer.Option(help="Leave alone what is younger: a writer may be at it.", min=0)
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
) -> None:
    """Remove leftovers of dead writers and duplicates, and put small shards together."""
    from mmllm_core.data.feature_upkeep import GarbagePlan, collect_garbage, summarise

    location = store or features_folder()
    stored = {found.fingerprint for found in summarise(location)}
    if unknown := set(keep or ()) - stored:
        raise FeatureStoreError(
            f"--keep {', '.join(sorted(unknown))}: nothing is stored of it: 'mmllm features list' shows the encoders"
        )
    unwanted = stored - set(keep or ()) if keep else set()
    if unused:
        unwanted = (unwanted if keep else stored) - set(bundles_by_fingerprint())
    plan = GarbagePlan(min_age_s=min_age_hours * 3600, unwanted=unwanted.__contains__, dry_run=dry_run)
    done = collect_garbage(location, plan)
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_row("leftovers of dead writers", str(done.leftovers))
    table.add_row("shards of unwanted encoders", str(done.unwanted_shards))
    table.add_row("duplicate rows", str(done.duplicate_rows))
    table.add_row("damaged rows met", str(done.damaged_rows))
    table.add_row("shards put together", f"{done.compacted} into {done.made}")
    console.print(table, highlight=False)
    console.print(f"{_size(max(0, done.n_bytes))} {'would be freed' if dry_run else 'freed'}", highlight=False)


def bundles_by_fingerprint() -> defaultdict[str, list[str]]:
    """Names of the bundles on this machine by the encoder whose features they take; nothing is verified.

    Raises:
        BundleError: a bundle cannot be read, so that nobody knows what it uses.
    """
    from mmllm_core.bundle import bundles_folder

    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(bundles_folder().glob("*/bundle.json")):
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            found[info["feature_fingerprint"]].append(path.parent.name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path}: cannot be read ({error}): remove the bundle or make it again") from error
    return found


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"
