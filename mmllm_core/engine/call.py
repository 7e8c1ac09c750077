"""A request on its way through an engine, and the way back to whoever asked. Does not know how it is computed."""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from mmllm_core.engine.protocol import EngineChunk, EngineRequest
from mmllm_core.errors import ConversationError, EngineError

Item = EngineChunk | BaseException


@dataclass(eq=False)
class Call:
    """A request and where its chunks go; shared by its answers."""

    request: EngineRequest
    loop: asyncio.AbstractEventLoop
    """The caller's."""
    grammar: Any = None
    """Compiled (`mmllm_core.engine.grammar.Grammars`), that all answers keep to."""
    chunks: "asyncio.Queue[Item]" = field(default_factory=asyncio.Queue)
    aborted: bool = False

    @property
    def late(self) -> bool:
        """Whether its time is up."""
        return self.request.deadline is not None and time.monotonic() >= self.request.deadline

    async def answers(self) -> AsyncIterator[EngineChunk]:
        """What is sent, until all answers have ended; what comes after an answer's end is dropped.

        Raises:
            EngineError: an error was sent.
        """
        unfinished = set(range(self.request.sampling.n))
        while unfinished:
            item = await self.chunks.get()
            if isinstance(item, EngineError):
                raise item
            if isinstance(item, BaseException):
                raise EngineError(f"generation failed: {item}") from item
            if item.index not in unfinished:  # it was aborted just as it ended
                continue
            if item.finish_reason is not None:
                unfinished.remove(item.index)
            yield item

    def send(self, item: Item) -> None:
        """Hand an item to the caller, from any thread; its loop may be gone."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.chunks.put_nowait, item)


def send_all(items: Iterable[tuple[Call, Item]]) -> None:
    """Hand items to their callers, from any thread, waking each event loop once; a loop may be gone."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Call, Item]]] = defaultdict(list)
    for call, item in items:
        by_loop[call.loop].append((call, item))
    for loop, deliveries in by_loop.items():
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_deliver, deliveries)


def _deliver(deliveries: list[tuple[Call, Item]]) -> None:
    for call, item in deliveries:
        call.chunks.put_nowait(item)


def positions(request: EngineRequest, context_length: int, capacity: int) -> int:
    """Positions that prompt and answer may take.

    Args:
        context_length: of the LM.
        capacity: positions that there is memory for.

    Raises:
        ConversationError: there is no room for a prompt of that length and a token.
    """
    most = min(context_length, capacity)
    if request.prompt_tokens + 1 > most:
        what = "the context" if most == context_length else "the memory for keys and values"
        raise ConversationError(
            f"the prompt takes {request.prompt_tokens} tokens and {what} holds {most}: shorten it", "messages"
        )
    return min(most, request.prompt_tokens + request.sampling.max_tokens)
