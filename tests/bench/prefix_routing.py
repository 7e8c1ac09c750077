"""What it gains that a conversation's turns go to the replica that computed the earlier ones.

    python -m tests.bench.prefix_routing [--conversations 4] [--turns 4] [--rounds 4]

Two replicas of SmolLM2-135M-Instruct, each with a thread, on real Ray Serve, once with `phi.routing: requests` and once
with `prefix`. Conversations run at the same time, each about a text of some 900 tokens that comes with its first turn;
both services are asked in turns. Out: JSON with, of each router, the share of prompt tokens that were computed before,
the time to the first token of the turns after the first, and their ratio.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import openai

from mmllm_core.bundle import Bundle, save_bundle
from mmllm_core.config import PathSource
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from tests.serve_apps.conftest import build_tiny_bundle, deploy, own_serve

SAID = "Tell me of rivers: where they rise, why they bend, and what lives in them and on their banks. "
ANSWER = 16
"""Tokens of an answer."""
Routing = Literal["requests", "prefix"]
ROUTINGS: tuple[Routing, ...] = ("requests", "prefix")


@dataclass(frozen=True)
class Turn:
    """What was measured of one turn."""

    number: int
    first_token_s: float
    prompt_tokens: int
    cached_tokens: int


def build_bundle(folder: Path) -> Bundle:
    """The embedded LM beside a tiny CLIP, untrained; `folder` is `MMLLM_HOME` from then on."""
    language = load_profile("embedded").language
    weights = resolve(language.source)
    tiny = build_tiny_bundle(folder)
    changed = {"source": PathSource(path=weights), "quantization": "none"}
    profile = tiny.profile.model_copy(update={"language": language.model_copy(update=changed)})
    shape = json.loads((weights / "config.json").read_text())
    connector = build_connector(
        profile.connector, tiny.info.d_vision, LmShape(shape["hidden_size"], shape["num_hidden_layers"])
    )
    info = tiny.info.model_copy(update={"name": "smollm2", "profile": profile})
    return save_bundle(info, connector, tiny.tokenizer, vision_weights=tiny.weights(tiny.profile.vision.source))


def start(bundle: Bundle, port: int, routing: Routing) -> openai.OpenAI:
    """Deploy two LM replicas with one router; the client of the service."""
    overrides = {
        "http.port": port,
        "ui": False,
        "phi.autoscaling": None,
        "phi.num_replicas": 2,
        "phi.threads": 1,
        "phi.kv_cache_bytes": 500_000_000,
        "phi.routing": routing,
    }
    return deploy(bundle, routing, f"/{routing}", overrides).client()


def hold(client: openai.OpenAI, model: str, first: int, conversations: int, turns: int) -> list[Turn]:
    """Hold conversations at the same time, numbered from `first`, each of which begins with a text of its own."""
    found: list[Turn] = []
    lock = threading.Lock()

    def converse(number: int) -> None:
        messages: list[Any] = [{"role": "system", "content": "You answer briefly and kindly."}]
        for turn in range(turns):
            messages.append(
                {"role": "user", "content": f"Conversation {number}, turn {turn}. " + SAID * (40 if turn == 0 else 1)}
            )
            begin, first, text, usage = time.monotonic(), 0.0, "", None
            for chunk in client.chat.completions.create(
                model=model,
                messages=messages,
                max_tokens=ANSWER,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"min_tokens": ANSWER},
            ):
                usage = chunk.usage or usage
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                first = first or (time.monotonic() - begin if piece else 0.0)
                text += piece
            assert usage is not None
            cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
            with lock:
                found.append(Turn(turn, first, usage.prompt_tokens, cached or 0))
            messages.append({"role": "assistant", "content": text.strip() or "..."})

    with ThreadPoolExecutor(conversations) as pool:
        list(pool.map(converse, range(first, first + conversations)))
    return found


def summary(turns: list[Turn]) -> dict[str, float]:
    """The figures of one router, over the turns after each conversation's first."""
    later = [turn for turn in turns if turn.number > 0]
    waits = sorted(turn.first_token_s for turn in later)
    return {
        "turns": len(later),
        "cached_share": sum(t.cached_tokens for t in later) / sum(t.prompt_tokens for t in later),
        "computed_tokens": sum(t.prompt_tokens - t.cached_tokens for t in later),
        "first_token_p50_s": statistics.median(waits),
        "first_token_p95_s": waits[min(len(waits) - 1, int(0.95 * len(waits)))],
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=4, help="at a time")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        bundle = build_bundle(Path(folder))
        with own_serve() as port:
            clients = {routing: start(bundle, port, routing) for routing in ROUTINGS}
            found: dict[Routing, list[Turn]] = {routing: [] for routing in ROUTINGS}
            for i in range(arguments.rounds):  # in turns, so that what else runs here slows both
                for routing, client in clients.items():
                    first = i * arguments.conversations
                    found[routing] += hold(client, bundle.info.name, first, arguments.conversations, arguments.turns)
    requests, prefix = (summary(found[routing]) for routing in ROUTINGS)
    ratio = {key: requests[key] / prefix[key] for key in ("computed_tokens", "first_token_p50_s", "first_token_p95_s")}
    print(json.dumps({"requests": requests, "prefix": prefix, "requests_over_prefix": ratio}))


if __name__ == "__main__":
    main()
