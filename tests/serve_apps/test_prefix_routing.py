"""Conversations stay with the replica that has computed them, on real Serve with two replicas of the LM."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from mmllm_core.bundle import Bundle
from mmllm_core.conversation import ImagePart, Message, TextPart
from mmllm_core.engine.protocol import SamplingParams
from serve_apps.prefix_router import PrefixRouter, Remembered
from serve_apps.prompt import BLOCK, Prompt
from tests.serve_apps.conftest import Service, image_part, image_uri, text_part
from tests.serve_apps.told_phi import NOTES, ToldPhi, answered_by

SYSTEM = {"role": "system", "content": "You are an assistant that answers at length. " * 8}
IMBALANCE = 1
LOOP = asyncio.Runner()
"""A router is of one loop."""


def prompt(*messages: Message, features: "np.ndarray[Any, Any] | None" = None) -> Prompt:
    return Prompt("a", messages, features, SamplingParams())


def common(a: Prompt, b: Prompt) -> int:
    pairs = zip(a.prefix.names, b.prefix.names, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.prefix.names), len(b.prefix.names)))


def test_a_conversation_that_goes_on_begins_with_the_names_it_had() -> None:
    turns = [Message.text("system", "Be brief. " * 100), Message.text("user", "Who?"), Message.text("assistant", "I.")]
    first, later = prompt(*turns[:2]), prompt(*turns, Message.text("user", "Why?"))
    assert later.prefix.names[: len(first.prefix.names)] == first.prefix.names
    assert 0 < first.prefix.n_system < len(first.prefix.names)
    other = prompt(turns[0], Message.text("user", "Where?"))
    assert common(first, other) == first.prefix.n_system
    # What is said matters, and so does who says it.
    assert common(prompt(Message.text("user", "I.")), prompt(Message.text("assistant", "I."))) == 0


def test_a_long_text_shares_what_it_begins_with() -> None:
    text = "x" * (3 * BLOCK)
    assert common(prompt(Message.text("user", text + "a")), prompt(Message.text("user", text + "b"))) == 3


def test_images_are_told_apart_by_what_is_seen() -> None:
    red, blue = np.zeros((1, 4, 8), np.float16), np.ones((1, 4, 8), np.float16)
    asked = [Message("user", (ImagePart(), TextPart(text))) for text in ("What?", "Where?")]
    assert common(prompt(asked[0], features=red), prompt(asked[1], features=red.copy())) > 0
    seen = common(prompt(asked[0], features=red), prompt(asked[1], features=red.copy()))
    assert common(prompt(asked[0], features=red), prompt(asked[0], features=blue)) < seen


def test_memory_is_bounded_and_keeps_beginnings_longest() -> None:
    computed = Remembered(4)
    computed.add([b"a", b"ab", b"abc"])
    computed.add([b"x", b"xy"])
    assert len(computed) == 4
    assert computed.matched([b"a", b"ab", b"abc"]) == 2
    assert computed.matched([b"x", b"xy", b"xyz"]) == 2
    computed.add([bytes([i]) for i in range(100)])
    assert len(computed) == 4


@dataclass(eq=False)
class Replica:
    """What a router sees of a replica that holds so many requests."""

    replica_id: ReplicaID
    busy: int = 0
    max_ongoing_requests: int = 4
    multiplexed_model_ids: frozenset[str] = frozenset()
    node_id: str = "here"
    availability_zone: str | None = None

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.busy


def routed(router: PrefixRouter, asked: Prompt) -> ReplicaID:
    """The replica that a request goes to; the router is told that it did."""
    metadata = RequestMetadata(request_id="a", internal_request_id="a", call_method="generate")

    async def choose() -> ReplicaID:
        request = PendingRequest([asked], {}, metadata)
        for rank in await router.choose_replicas(list(router.curr_replicas.values()), request):
            if chosen := await router._select_from_candidate_replicas(rank, 0):
                router.on_request_routed(request, chosen.replica_id, None)
                found: ReplicaID = chosen.replica_id
                return found
        raise AssertionError("nobody takes it")

    return LOOP.run(choose())


def router_of(*replicas: Replica, **settings: int) -> PrefixRouter:
    router = PrefixRouter(
        deployment_id=DeploymentID("phi", "app"),
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
    )
    router.initialize_state(**settings)
    known(router, *replicas)
    return router


def known(router: PrefixRouter, *replicas: Replica) -> None:
    """Tell a router which replicas there are, as Serve does."""

    async def update() -> None:
        router.update_replicas(list(replicas))
        await asyncio.sleep(0)

    LOOP.run(update())


def replicas(n: int) -> list[Replica]:
    return [Replica(ReplicaID(str(i), DeploymentID("phi", "app"))) for i in range(n)]


def conversation(i: int, turns: int = 1) -> Prompt:
    said = [Message.text("user" if j % 2 == 0 else "assistant", f"{i}: {j}") for j in range(2 * turns - 1)]
    return prompt(Message.text("system", "Be brief."), *said)


def test_a_conversation_goes_where_it_went_and_two_routers_choose_alike() -> None:
    fleet = replicas(4)
    one, two = router_of(*fleet), router_of(*fleet)
    first = [routed(one, conversation(i)) for i in range(20)]
    assert len(set(first)) == 4
    assert [routed(one, conversation(i, 2)) for i in range(20)] == first
    assert [routed(two, conversation(i, 2)) for i in range(20)] == first  # though it knows of none


def test_a_full_holder_is_passed_over_whatever_the_imbalance() -> None:
    fleet = replicas(3)
    router = router_of(*fleet, imbalance=100)
    holder = routed(router, conversation(0))
    by_id = {replica.replica_id: replica for replica in fleet}

    def fill(id: ReplicaID) -> None:
        by_id[id].busy = 4
        router.on_new_queue_len_info(id, 4)

    fill(holder)
    second = routed(router, conversation(0, 2))
    assert second != holder
    fill(second)
    assert routed(router, conversation(0, 3)) not in (holder, second)


def test_replicas_that_go_are_forgotten_and_those_that_come_are_used() -> None:
    fleet = replicas(2)
    router = router_of(*fleet)
    holder = routed(router, conversation(0))
    [other] = [replica for replica in fleet if replica.replica_id != holder]
    known(router, other)
    assert routed(router, conversation(0, 2)) == other.replica_id
    known(router, other, *[replica for replica in fleet if replica is not other])
    assert routed(router, conversation(0, 3)) == other.replica_id  # the other has forgotten it
    router.on_replica_actor_died(other.replica_id)
    assert routed(router, conversation(0, 3)) == holder
    assert set(router._computed) == {holder}


@dataclass(frozen=True)
class Fleet:
    """A service of two LM replicas that tell where they answered."""

    service: Service
    notes: Path

    def answer(self, messages: list[Any]) -> tuple[str, int, int]:
        """The text, the replica's process, and the tokens of the prompt that it had computed before."""
        reply = self.service.client().chat.completions.create(
            model=self.service.model, messages=messages, max_tokens=6, temperature=0
        )
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        cached = reply.usage.prompt_tokens_details.cached_tokens
        text = reply.choices[0].message.content or "..."
        return text, answered_by(self.notes)[reply.id], cached or 0

    def converse(self, first: Any, turns: int) -> tuple[list[Any], list[int], list[int]]:
        """Ask, and go on asking; the messages, and of each turn the replica and the cached tokens."""
        messages: list[Any] = [SYSTEM, {"role": "user", "content": first}]
        replicas, cached = [], []
        for turn in range(turns):
            text, replica, n_cached = self.answer(messages)
            replicas.append(replica)
            cached.append(n_cached)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And then, {turn}?"}]
        return messages, replicas, cached


@pytest.fixture(scope="module")
def fleet(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        notes = tmp_path_factory.mktemp("notes") / "answered"
        patch.setenv(NOTES, str(notes))  # before Ray starts: its workers inherit it
        patch.setattr("serve_apps.builder.PhiDeployment", ToldPhi)
        yield from _fleet(bundle, notes)


def _fleet(bundle: Bundle, notes: Path) -> Iterator[Fleet]:
    from tests.serve_apps.conftest import NO_SOUND, SMALL_LM, deploy, own_serve

    with own_serve() as port:
        overrides = {
            "http.port": port,
            "ui": False,
            "phi.autoscaling": None,
            "phi.num_replicas": 2,
            "phi.routing_imbalance": IMBALANCE,
        }
        yield Fleet(deploy(bundle, "mmllm", "/", overrides | NO_SOUND | SMALL_LM), notes)


@pytest.mark.slow
def test_the_turns_of_a_conversation_land_on_one_replica(fleet: Fleet) -> None:
    pictured = [image_part(image_uri("red")), text_part("What is it?")]
    for first in ("Who are you?", "Where is it?", pictured, [image_part(image_uri("blue")), text_part("What is it?")]):
        _, replicas, cached = fleet.converse(first, 4)
        assert len(set(replicas)) == 1
        assert all(n > 0 for n in cached[1:])
        assert cached == sorted(cached)


@pytest.mark.slow
def test_different_conversations_spread(fleet: Fleet) -> None:
    found = {fleet.converse(f"Question number {i}: why?", 1)[1][0] for i in range(16)}
    assert len(found) == 2


@pytest.mark.slow
def test_a_holder_that_is_much_busier_is_passed_over(fleet: Fleet) -> None:
    messages, [holder, *_], _ = fleet.converse("Who is busy?", 2)
    lines: list[Iterator[str]] = []
    with ExitStack() as streams:
        for i in range(IMBALANCE + 1):  # the holder takes them, for each belongs to the conversation
            body = {"model": "tiny", "messages": messages, "max_tokens": 1500, "min_tokens": 1500, "stream": True}
            url = f"{fleet.service.base_url}/v1/chat/completions"
            stream = streams.enter_context(httpx.stream("POST", url, json=body | {"seed": i}, timeout=60))
            lines.append(stream.iter_lines())  # kept, for a stream whose lines nobody holds is closed
            first = json.loads(next(lines[-1]).removeprefix("data: "))
            assert answered_by(fleet.notes)[first["id"]] == holder
        _, elsewhere, _ = fleet.answer(messages)
        assert elsewhere != holder
    assert fleet.answer(messages)[2] > 0  # both have computed it now


@pytest.mark.slow
def test_conversations_of_a_killed_replica_go_on_elsewhere(fleet: Fleet) -> None:
    messages, [holder, *_], _ = fleet.converse("Who dies?", 2)
    os.kill(holder, signal.SIGKILL)
    begin = time.monotonic()
    while time.monotonic() - begin < 60:
        try:
            text, replica, _ = fleet.answer(messages)
            break
        except openai.APIError:  # what was sent as it died is told so; the next is answered
            time.sleep(0.2)
    assert replica != holder
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Still there?"}]
    _, again, cached = fleet.answer(messages)
    assert again == replica
    assert cached > 0
