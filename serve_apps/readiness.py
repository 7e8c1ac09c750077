"""Whether every part of the assistant answers: a tiny picture, a moment of silence and one token, for real.

A part that is scaled to zero is asleep, and is not woken to be asked. Does not know HTTP.
"""

import asyncio
import io
import wave
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal

from PIL import Image

from mmllm_core.conversation import Message, TextPart
from mmllm_core.engine.protocol import SamplingParams
from serve_apps.asking import ask
from serve_apps.config import DeploymentConfig, ServeConfig
from serve_apps.prompt import Prompt
from serve_apps.ray_process import has_no_room
from serve_apps.shared_answer import SharedAnswer
from serve_apps.upload import Upload

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

State = Literal["ready", "asleep", "not ready"]
TIMEOUT_S = 10.0
"""That a part has to answer."""
REMEMBERED_S = 1.0
"""How long an answer holds, so that many who ask cost no more than one."""


class Readiness:
    """Asks the parts.

    Args:
        clip, whisper, phi: handles of the deployments.
    """

    def __init__(
        self, clip: "DeploymentHandle", whisper: "DeploymentHandle", phi: "DeploymentHandle", config: ServeConfig
    ):
        self._clip, self._whisper, self._phi = clip, whisper, phi
        self._parts: dict[str, tuple[DeploymentConfig, Callable[[], Awaitable[object]]]] = {
            "vision": (config.clip, self._see),
            "audio": (config.whisper, self._hear),
            "text": (config.phi, self._speak),
        }
        self._shared = SharedAnswer(self._ask, REMEMBERED_S)

    async def states(self) -> dict[str, State]:
        """The state of each modality."""
        return await self._shared.get()

    async def _ask(self) -> dict[str, State]:
        states = await asyncio.gather(*(self._state(*part) for part in self._parts.values()))
        return dict(zip(self._parts, states, strict=True))

    async def _state(self, config: DeploymentConfig, answer: Callable[[], Awaitable[object]]) -> State:
        if config.autoscaling and config.autoscaling.min_replicas == 0:
            return "asleep"
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await answer()
        except Exception as error:
            # It may turn requests away since it has many, not since it cannot answer.
            return "ready" if has_no_room(error) else "not ready"
        return "ready"

    async def _see(self) -> None:
        stream = io.BytesIO()
        Image.new("RGB", (32, 32), "gray").save(stream, "png")
        await ask(lambda: self._clip.encode.remote((Upload(stream.getvalue(), "readyz"),)))

    async def _hear(self) -> None:
        stream = io.BytesIO()
        with wave.open(stream, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(bytes(2 * 3200))
        await ask(lambda: self._whisper.transcribe.remote(Upload(stream.getvalue(), "readyz")))

    async def _speak(self) -> None:
        prompt = Prompt("readyz", (Message("user", (TextPart("Hi"),)),), None, SamplingParams(max_tokens=1), TIMEOUT_S)
        response = self._phi.options(stream=True).generate.remote(prompt)
        try:
            async for _ in response:
                pass
        finally:
            response.cancel()
