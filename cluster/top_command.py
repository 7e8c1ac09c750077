"""`mmllm top`: a running service in the terminal, as it goes. The figures are `cluster.live_metrics`' own."""

import time
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.keys_commands import ApiKeyOption
from cluster.live_metrics import Frame, frame, take_look

UNITS = {"text": "tokens/s", "vision": "images/s", "audio": "s of sound/s"}


def top(
    base_url: Annotated[str, typer.Option(help="Where the assistant is served.")] = "http://127.0.0.1:8000",
    api_key: ApiKeyOption = "local",
    every: Annotated[float, typer.Option(help="Seconds between looks.", min=0.2)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, after one interval, and end.")] = False,
) -> None:
    """Watch a running assistant: requests, waiting, tokens, replicas and caches."""
    console, url = Console(), base_url.rstrip("/")
    before = take_look(url, api_key, time.monotonic())
    if once:
        time.sleep(every)
        console.print(shown(url, frame(before, take_look(url, api_key, time.monotonic()))))
        return
    with Live(Text(f"looking at {url}"), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            time.sleep(every)
            now = take_look(url, api_key, time.monotonic())
            live.update(shown(url, frame(before, now)), refresh=True)
            before = now


def shown(url: str, now: Frame) -> Group:
    """A frame as it is printed."""
    whole = Table(title=f"mmllm at {url}", box=None, padding=(0, 2), title_justify="left", show_header=False)
    whole.add_row("requests/s", f"{now.requests:.1f}", "failed/s", f"{now.failed:.1f}", "open", str(now.open))
    whole.add_row(
        "first token p50, p95",
        f"{_ms(now.ttft[0])}, {_ms(now.ttft[1])}",
        "between tokens p50, p95",
        f"{_ms(now.between_tokens[0])}, {_ms(now.between_tokens[1])}",
    )
    factor = "-" if now.real_time_factor is None else f"{now.real_time_factor:.2f}"
    whole.add_row("memory for keys and values", f"{now.kv_use:.0%}", "audio real-time factor", factor)
    parts = Table("modality", "replicas", "waiting", "running", "rate", "from cache", box=None, padding=(0, 2))
    for modality, part in now.modalities.items():
        cached = "-" if part.cached is None else f"{part.cached:.0%}"
        rate = f"{part.rate:.1f} {UNITS[modality]}"
        parts.add_row(modality, str(part.replicas), str(part.waiting), str(part.running), rate, cached)
    return Group(whole, "", parts)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
