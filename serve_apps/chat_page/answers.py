"""One answer, from the question to what the page shows of it.

In: a history and settings. Out: what was heard, the answer so far, and at its end how fast it came and which pictures
had been seen before, or what went wrong.
Closing the iterator closes the stream, with which the service stops. Does not know Gradio.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from serve_apps.chat_page.messages import HEARD, NOTICE, PRINT, Message, QuestionError, shown_name, to_call

SHOWN_EVERY_S = 0.05
"""How often a page is told of an answer that comes: each time, Gradio goes through the whole conversation."""
_TIERS = {
    "computed": "seen now",
    "shared": "seen now",
    "store": "reused from the store",
    "file": "reused from the upload",
}


@dataclass(frozen=True)
class Settings:
    """What a visitor typed; "" leaves it to the service."""

    model: str
    system: str = ""
    temperature: str = ""
    max_tokens: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the request, but for messages; the service says which numbers it takes.

        Raises:
            QuestionError: something else than a number where one is wanted.
        """
        typed = {"temperature": ("Temperature", self.temperature), "max_tokens": ("Tokens at most", self.max_tokens)}
        return {"model": self.model} | {name: _number(*given) for name, given in typed.items() if given[1].strip()}


def _number(label: str, typed: str) -> float | int:
    try:
        return float(typed) if label == "Temperature" else int(typed)
    except ValueError:
        raise QuestionError(f"'{typed}' is no number: change {label} in the settings.") from None


async def answer(
    client: openai.AsyncOpenAI, history: list[Message], settings: Settings
) -> AsyncGenerator[list[Message], None]:
    """Ask what `history` ends with, and yield all that is to be shown, again and again until it is complete.

    What fails is shown too.
    """
    heard: list[str] = []
    found: list[str] = []
    text, notice, pace, shown = "", "", Pace(), 0.0
    try:
        call = await asyncio.to_thread(to_call, history, settings.system)
        messages: Any = call.messages
        asked = client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **settings.fields
        )
        async with await asked as stream:
            async for chunk in stream:
                extra = chunk.model_extra or {}
                transcripts = extra.get("transcripts") or []
                heard += transcripts[-call.recordings :] if call.recordings else []  # earlier ones were sent again
                found += map(_found, call.pictures, extra.get("images") or [])
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                pace.note(piece, chunk.usage.completion_tokens if chunk.usage else None)
                text += piece
                if time.monotonic() >= shown + SHOWN_EVERY_S:
                    shown = time.monotonic()
                    yield to_reply(heard, text)
        notice = "" if text else "The answer came back empty. Try again, or ask in another way."
    except (openai.APIError, httpx.TransportError, OSError, QuestionError) as error:
        notice = explain(error, str(client.base_url))
    yield to_reply(heard, text, notice, " · ".join([*pace.told(), *found]) if text else "")


def _found(name: str, tier: str) -> str:
    """Whether a picture was looked at for this answer, or what was seen before was used again."""
    return f"{shown_name(name)} {_TIERS.get(tier, 'reused from memory')}"


class Pace:
    """How fast an answer comes, as its reader sees it."""

    def __init__(self) -> None:
        self._asked = self._last = time.monotonic()
        self._first: float | None = None
        self._tokens: int | None = None

    def note(self, piece: str, tokens: int | None) -> None:
        """Note a piece of text, and the count of all tokens where it is told."""
        self._tokens = self._tokens if tokens is None else tokens
        if piece:
            self._last = time.monotonic()
            self._first = self._first or self._last

    def told(self) -> list[str]:
        """In words; nothing before the first token."""
        if self._first is None:
            return []
        facts = [f"first token after {self._first - self._asked:.2f} s"]
        if self._tokens:
            facts.append(f"{self._tokens} token{'s' * (self._tokens > 1)}")
        if self._tokens and self._tokens > 1 and self._last > self._first:
            facts.append(f"{(self._tokens - 1) / (self._last - self._first):.0f} tokens/s")
        return facts


def to_reply(heard: list[str], text: str, notice: str = "", pace: str = "") -> list[Message]:
    """What the page shows for one answer: what was heard, the answer so far, what went wrong, and how fast it came."""
    quotes = "\n".join(f"> Heard: {' '.join(line.split()) or '(no speech)'}" for line in heard)
    shown = [
        (quotes, HEARD),
        (text, ""),
        (notice and f"⚠️ {notice}", NOTICE),
        (pace and f"<small>{pace}</small>", PRINT),
    ]
    return [
        {"role": "assistant", "content": content} | ({"metadata": {"id": kind}} if kind else {})
        for content, kind in shown
        if content
    ]


def explain(error: Exception, base_url: str) -> str:
    """Say what went wrong; what the service says of it is told as it is, with the status of HTTP."""
    match error:
        case openai.APIStatusError(body={"message": str(detail)}) if detail:
            return f"{error.status_code}: {detail}"
        case openai.APIStatusError():
            return f"{error.status_code}: {error.response.text[:500] or error.response.reason_phrase}"
        case openai.APITimeoutError():
            return f"{base_url} did not answer in time. Try again, or ask for something shorter."
        case openai.APIConnectionError() | httpx.TransportError():
            return f"The connection to {base_url} failed. Try again in a moment."
        case openai.APIError():
            return error.message
        case OSError():
            return "A file of this conversation is no longer here. Start a new chat and add it again."
        case _:
            return str(error)
