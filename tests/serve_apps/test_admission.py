"""No more chats are let in than the LM can answer and let wait."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from serve_apps.admission import CHAT, Admission, capacity
from serve_apps.config_files import load_serve_config

SMALL = {"phi.autoscaling": None, "phi.max_ongoing_requests": 1, "phi.max_queued_requests": 1}


def test_all_ingress_replicas_together_let_in_what_the_lm_takes() -> None:
    assert capacity(load_serve_config("embedded", SMALL)) == 2
    many = SMALL | {"phi.num_replicas": 3, "phi.max_queued_requests": 4, "ui": False, "ingress.num_replicas": 2}
    assert capacity(load_serve_config("embedded", many)) == 4
    for queued in (-1, 1000):
        held = SMALL | {"phi.max_queued_requests": queued, "ingress.max_ongoing_requests": 100}
        assert capacity(load_serve_config("embedded", held)) == 90, "others and health checks have room"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_who_is_turned_away_comes_back_when_another_has_left() -> None:
    free, failing = asyncio.Event(), asyncio.Event()
    inside: list[bytes] = []
    app = FastAPI()
    config = load_serve_config("embedded", SMALL)

    @app.post(CHAT)
    async def chat(request: Request) -> dict[str, bool]:
        inside.append(await request.body())
        await free.wait()
        if failing.is_set():
            raise RuntimeError("a failure must not keep its place")
        return {"answered": True}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    transport = httpx.ASGITransport(Admission(app, config), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:

        def ask(n: int) -> list[asyncio.Task[Any]]:
            return [asyncio.create_task(client.post(CHAT)) for _ in range(n)]

        for fails in (False, True, False):
            (failing.set if fails else failing.clear)()
            free.clear()
            inside.clear()
            asked = ask(2)
            while len(inside) < 2:
                await asyncio.sleep(0)
            refused = await client.post(CHAT)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "overloaded"
            assert (await client.get("/healthz")).status_code == 200
            free.set()
            assert [reply.status_code for reply in await asyncio.gather(*asked)] == [500 if fails else 200] * 2
