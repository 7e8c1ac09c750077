"""`mmllm ui`: the chat page by itself, before an assistant that runs anywhere.

Options in, a page at a local port out; all else is asked of the API. Does not know models.
"""

import os
from typing import Annotated

import typer
from rich.console import Console

from cluster.keys_commands import ApiKeyOption


def ui(
    base_url: Annotated[
        str, typer.Option("--base-url", "--url", help="Where the assistant is served.")
    ] = "http://127.0.0.1:8000",
    api_key: ApiKeyOption = "local",
    model: Annotated[str | None, typer.Option(help="Who answers at first; the first that is served.")] = None,
    port: Annotated[int, typer.Option(help="Of the page.", min=1, max=65535)] = 7860,
) -> None:
    """Open the chat page before an assistant that runs somewhere else; Ctrl-C ends it."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from cluster.ask import Asker
    from cluster.server import require_free_port
    from serve_apps.chat_page.page import PAGE_OPTIONS, build_chat_page

    require_free_port("127.0.0.1", port)
    asker = Asker(base_url, api_key, model)
    page = build_chat_page(asker.base_url, asker.model, api_key)
    page.launch(server_name="127.0.0.1", server_port=port, quiet=True, prevent_thread_lock=True, **PAGE_OPTIONS)
    Console().print(f"Chat page: http://127.0.0.1:{port}   model: {asker.model}   Ctrl-C ends it.")
    page.block_thread()
