"""The LM's deployment as it is, which also notes where each prompt was answered."""

import os
from collections.abc import AsyncGenerator
from pathlib import Path

from mmllm_core.engine.protocol import EngineChunk
from serve_apps.phi_app import PhiDeployment
from serve_apps.prompt import Prompt

NOTES = "MMLLM_TEST_NOTES"
"""Names the file that is written to: a line of each prompt's id and the process that answered it."""


class ToldPhi(PhiDeployment):
    """`PhiDeployment` that tells on itself."""

    async def generate(self, prompt: Prompt) -> AsyncGenerator[EngineChunk, None]:
        """As `PhiDeployment.generate`."""
        with Path(os.environ[NOTES]).open("a") as notes:
            notes.write(f"{prompt.id} {os.getpid()}\n")
        async for chunk in super().generate(prompt):
            yield chunk


def answered_by(notes: Path) -> dict[str, int]:
    """The process that answered each prompt; of one that was sent twice, the last."""
    return {id: int(pid) for id, pid in (line.split() for line in notes.read_text().splitlines())}
