"""`mmllm keys`: make, list and revoke the API keys of a file. A running service sees the change by itself.

Options in, a line or a table out; the work is done by `serve_apps.api_keys`. A key itself is printed once, to standard
output alone, and kept nowhere.
"""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmllm_core.errors import ConfigError
from mmllm_core.models.home import home

keys_app = typer.Typer(help="API keys of a service: make, list and revoke them.")
console = Console() if sys.stdout.isatty() else Console(width=1_000)  # a pipe wants a line a row

File = Annotated[
    Path | None, typer.Option("--file", help="The file of keys; keys.yaml in MMLLM_HOME if not given.", dir_okay=False)
]
ApiKeyOption = Annotated[str, typer.Option(envvar="MMLLM_API_KEY", help="Where the service asks for one.")]
"""The option of every command that asks a running service."""
Limit = Annotated[int | None, typer.Option(min=1, help="None if not given.")]


def keys_file(given: Path | None) -> Path:
    """The file that an option names, or the one that is kept at home."""
    return (given or home() / "keys.yaml").expanduser().absolute()


@keys_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key: letters, digits, and . _ - between them.")],
    file: File = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    model: Annotated[list[str] | None, typer.Option(help="A model that it may ask for; all if not given.")] = None,
    expires_days: Annotated[float | None, typer.Option(min=0, help="Never, if not given.")] = None,
) -> None:
    """Make a key and print it: it cannot be shown again."""
    from serve_apps.api_keys import ApiKey, add_key

    now = datetime.now(UTC).replace(microsecond=0)
    try:
        key = ApiKey(
            id=name,
            sha256="0" * 64,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            models=model or None,
            created=now,
            expires=None if expires_days is None else now + timedelta(days=expires_days),
        )
    except ValidationError:
        raise ConfigError(f"'{name}' is no name for a key: take up to 64 letters, digits, and . _ - between") from None
    path = keys_file(file)
    secret = add_key(path, key)
    note = f"The key of '{name}' is kept as a hash in {path}; this is the only time that it is shown:"
    Console(stderr=True).print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(secret, markup=False, highlight=False, soft_wrap=True)


@keys_app.command("list")
def list_keys(file: File = None) -> None:
    """Show whose keys there are and what they may do."""
    from serve_apps.api_keys import read_keys

    table = Table("name", "requests/min", "tokens/min", "models", "created", "expires", box=None, padding=(0, 2))
    for key in read_keys(keys_file(file)):
        expires = "never" if key.expires is None else f"{key.expires:%Y-%m-%d %H:%M}"
        table.add_row(
            escape(key.id),
            str(key.requests_per_minute or "any"),
            str(key.tokens_per_minute or "any"),
            escape("all" if key.models is None else ", ".join(key.models)),
            "" if key.created is None else f"{key.created:%Y-%m-%d %H:%M}",
            f"{expires} (over)" if key.has_expired else expires,
        )
    console.print(table if table.row_count else "there are no keys", highlight=False)


@keys_app.command()
def revoke(name: Annotated[str, typer.Argument(help="Whose key.")], file: File = None) -> None:
    """Take a key away: a running service refuses it from now on."""
    from serve_apps.api_keys import remove_key

    remove_key(keys_file(file), name)
    console.print(f"the key of '{name}' is revoked", markup=False, highlight=False)
