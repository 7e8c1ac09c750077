"""A part that fails is named, one that sleeps is not woken, and many who ask cost one answer."""

import asyncio
from typing import Any

from serve_apps.config_files import load_serve_config
from serve_apps.readiness import Readiness


class Part:
    """Answers in the place of a deployment's handle."""

    def __init__(self, fails: bool = False):
        self.asked = 0
        self._fails = fails
        self.encode = self.transcribe = self.generate = self

    def options(self, **_: Any) -> "Part":
        return self

    def remote(self, _: Any) -> "Part":
        self.asked += 1
        return self

    def cancel(self) -> None:
        pass

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def __aiter__(self) -> Any:
        yield await self._answer()

    async def _answer(self) -> None:
        await asyncio.sleep(0.01)
        if self._fails:
            raise RuntimeError("no answer")


def test_what_fails_is_named_and_what_sleeps_is_left_asleep() -> None:
    clip, whisper, phi = Part(), Part(fails=True), Part()
    config = load_serve_config("embedded", {"clip.autoscaling.min_replicas": 0})

    async def ask() -> list[dict[str, str]]:
        readiness = Readiness(clip, whisper, phi, config)  # type: ignore[arg-type]
        return await asyncio.gather(*(readiness.states() for _ in range(5)))

    found = asyncio.run(ask())
    assert found == [{"vision": "asleep", "audio": "not ready", "text": "ready"}] * 5
    assert (clip.asked, whisper.asked, phi.asked) == (0, 1, 1)
