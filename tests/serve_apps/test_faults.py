"""Nothing is lost silently: replicas are killed without a warning, and all are replaced, under mixed requests."""

import asyncio

import pytest

from serve_apps.builder import CLIP, PHI, WHISPER
from tests.bench.chaos import kills, redeploy, service
from tests.serve_apps.conftest import BOTH_PROXIES, Proxy
from tests.serve_apps.faults import MixedLoad

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize("proxy", BOTH_PROXIES)
def test_killed_replicas_and_a_redeploy_lose_nothing(
    speech: bytes, monkeypatch: pytest.MonkeyPatch, proxy: Proxy
) -> None:
    monkeypatch.setenv("MMLLM_HOME", "")  # so that it is put back: a home of the tiny bundle's own is set meanwhile
    monkeypatch.delenv("MMLLM_HOME")
    with service(proxy) as (target, deploy_with):
        load = MixedLoad(target.base_url, target.model, speech)
        found = asyncio.run(kills(load, target.app_name, 150, [CLIP, WHISPER, PHI]))
        assert set(found["killed"]) == {CLIP, WHISPER, PHI}
        for ending in load.endings:
            # whole answers were told nothing of yet, so they are asked for again
            assert ending.how == "answered" or (ending.streamed and ending.how == "error event"), ending
        assert sum(ending.how == "answered" for ending in load.endings) >= 0.9 * len(load.endings)
        asyncio.run(redeploy(load, deploy_with))
        assert {ending.how for ending in load.endings} == {"answered"}
