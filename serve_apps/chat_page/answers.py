"""One answer, from the question to what the page shows of it.

In: messages and settings. Out: what was heard, the answer so far and at its end how fast it came, or what went wrong.
Closing the iterator closes the stream, with which the service stops. Does not know Gradio.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import openai

from serve_apps.chat_page.messages import HEARD, NOTICE, PRINT, Message, QuestionError, to_messages


@dataclass(frozen=True)
class Settings:
    """What a visitor set; None and "" leave it to the service."""

    model: str
    system: str = ""
    temperature: float | None = None
    max_tokens: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the request, but for messages."""
        chosen = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {"model": self.model} | {name: value for name, value in chosen.items() if value is not None}


async def answer(
    client: openai.AsyncOpenAI, history: list[Message], question: Message, settings: Settings
) -> AsyncIterator[list[Message]]:
    """Ask, and yield all that is to be shown, again and again until it is complete. What fails is shown too."""
    heard: list[str] = []
    text, notice, pace = "", "", Pace()
    try:
        messages: Any = await asyncio.to_thread(to_messages, history, question, settings.system)
        recordings = sum(part["type"] == "input_audio" for part in messages[-1]["content"])
        asked = client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **settings.fields
        )
        async with await asked as stream:
            async for chunk in stream:
                transcripts = (chunk.model_extra or {}).get("transcripts") or []
                heard += transcripts[-recordings:] if recordings else []  # earlier recordings were sent again
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                pace.note(piece, chunk.usage.completion_tokens if chunk.usage else None)
                text += piece
                yield to_reply(heard, text)
        notice = "" if text else "The answer came back empty. Try again, or ask in another way."
    except (openai.APIError, OSError, QuestionError) as error:
        notice = explain(error)
    yield to_reply(heard, text, notice, pace.told() if text else "")


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

    def told(self) -> str:
        """In words, or "" before the first word."""
        if self._first is None:
            return ""
        facts = [f"first word after {self._first - self._asked:.2f} s"]
        if self._tokens:
            facts.append(f"{self._tokens} token{'s' * (self._tokens > 1)}")
        if self._tokens and self._tokens > 1 and self._last > self._first:
            facts.append(f"{(self._tokens - 1) / (self._last - self._first):.0f} tokens/s")
        return " · ".join(facts)


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


def explain(error: Exception) -> str:
    """Say for a person what went wrong and what to do; what the service says of it is told as it is."""
    match error:
        case openai.APITimeoutError():
            return "The assistant took too long to answer. Try again, or ask for something shorter."
        case openai.APIConnectionError():
            return "The connection to the assistant failed. Try again in a moment."
        case openai.RateLimitError(body={"code": "rate_limit_exceeded", "message": str(detail)}):
            return f"Too much at a time: {detail}"
        case openai.APIStatusError(status_code=429 | 502 | 503 | 504):
            return "The assistant is busy or still starting. Try again in a moment."
        case openai.APIError(body={"message": str(detail)}) if detail:
            return f"The assistant could not answer: {detail}"
        case openai.APIError():
            return "The assistant could not answer this. Try again, or ask in another way."
        case OSError():
            return "A file of this conversation is no longer here. Start a new chat and add it again."
        case _:
            return str(error)
