"""The LM's deployment without Serve and HTTP, in a process of its own, for `tests.bench.serving`.

python -m tests.bench.bare_engine BUNDLE REQUESTS CALLERS
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from mmllm_core.bundle import Bundle
from mmllm_core.conversation import Message, TextPart
from mmllm_core.engine.protocol import SamplingParams
from serve_apps.config_files import load_serve_config
from serve_apps.phi_app import PhiDeployment
from serve_apps.prompt import Prompt
from serve_apps.served_bundles import ServedBundle
from tests.bench.serving import TOKENS, summary
from tests.serve_apps.faults import Ending, MixedLoad


async def ask(phi: PhiDeployment, text: str, id: str) -> Ending:
    """One answer."""
    began, first = time.monotonic(), None
    sampling = SamplingParams(max_tokens=TOKENS, min_tokens=TOKENS)
    async for chunk in phi.generate(Prompt(id, (Message("user", (TextPart(text),)),), None, sampling)):
        if first is None and chunk.text:
            first = time.monotonic() - began
    return Ending("text", True, "answered", time.monotonic() - began, first)


async def measure(bundle: Path, n_requests: int, n_callers: int) -> dict[str, Any]:
    """The texts of the service's load."""
    opened = Bundle.open(bundle)
    phi = PhiDeployment({opened.info.name: ServedBundle.of(opened)}, load_serve_config("embedded").phi)

    async def closed(load: MixedLoad, n: int) -> list[Ending]:
        numbers, endings = iter(range(n)), []

        async def call() -> None:
            for number in numbers:
                endings.append(await ask(phi, load.content("text", number), f"{load.seed}-{number}"))

        await asyncio.gather(*(call() for _ in range(n_callers)))
        return endings

    await closed(MixedLoad("", "", b"", seed=1), 4)
    began, before = time.monotonic(), time.process_time()
    endings = await closed(MixedLoad("", "", b"", seed=2), n_requests)
    taken = time.process_time() - before
    return summary(endings, time.monotonic() - began) | {"cpu_s_per_request": taken / n_requests}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))))
