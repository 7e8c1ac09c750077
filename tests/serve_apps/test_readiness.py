"""A part that fails is named, one that sleeps is not woken, and many who ask cost one answer."""

import asyncio
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from serve_apps.config_files import load_serve_config
from serve_apps.readiness import Readiness


class Part:
    """Answers in the place of a deployment's handle."""

    def __init__(self, error: Exception | None = None, seconds: float = 0.01):
        self.asked = 0
        self._error = error
        self._seconds = seconds
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
        await asyncio.sleep(self._seconds)
        if self._error:
            raise self._error


def test_what_fails_is_named_and_what_sleeps_is_left_asleep() -> None:
    clip, whisper, phi = Part(), Part(RuntimeError("no answer")), Part()
    config = load_serve_config("embedded", {"clip.autoscaling.min_replicas": 0})

    async def ask() -> list[dict[str, str]]:
        readiness = Readiness(clip, whisper, phi, config)  # type: ignore[arg-type]
        return await asyncio.gather(*(readiness.states() for _ in range(5)))

    found = asyncio.run(ask())
    assert found == [{"vision": "asleep", "audio": "not ready", "text": "ready"}] * 5
    assert (clip.asked, whisper.asked, phi.asked) == (0, 1, 1)


def test_a_part_that_hangs_is_not_ready_and_one_that_has_too_much_to_do_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_apps.readiness.TIMEOUT_S", 0.05)
    clip, whisper, phi = Part(seconds=60), Part(BackPressureError(1, 1)), Part()

    async def ask() -> dict[str, str]:
        readiness = Readiness(clip, whisper, phi, load_serve_config("embedded"))  # type: ignore[arg-type]
        return await readiness.states()

    assert asyncio.run(ask()) == {"vision": "not ready", "audio": "ready", "text": "ready"}
