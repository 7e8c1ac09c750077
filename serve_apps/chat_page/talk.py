"""What happens on the chat page when a visitor does something.

In: what Gradio tells of the event, the conversation on the page included. Out: what the page shows then, and what the
browser is to keep. Holds nothing of a visitor's between events.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import takewhile
from pathlib import Path
from typing import Any

import gradio as gr
import openai
from gradio.utils import get_upload_folder

from serve_apps.chat_page.about import about, examples
from serve_apps.chat_page.answers import Settings, answer, to_reply
from serve_apps.chat_page.history import from_stored, title_of, to_stored
from serve_apps.chat_page.messages import Message, question_of
from serve_apps.credentials import presented_key

Shown = tuple[Any, Any, Any, Any]
"""Of the box, the conversation, its id, and what the browser keeps."""


class Talk:
    """The answers to a visitor's doings.

    Args:
        client: of the API, with the key for those who bring none.
        model: that is asked for until another is chosen.
    """

    def __init__(self, client: openai.AsyncOpenAI, model: str):
        self._client = client
        self.model = model

    async def ask(
        self, request: gr.Request, message: Message | None, history: list[Message], chat: str, *given: Any
    ) -> AsyncIterator[Shown]:
        """What stands in the box is asked, and leaves it.

        Args:
            given: the settings on the page: model, system prompt, temperature, tokens at most, API key.
        """
        question = question_of(message)
        if not question:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        async for shown in self._answered(request, _asking_box(value=None), [*_ended(history), *question], chat, given):
            yield shown

    async def ask_again(
        self, request: gr.Request, history: list[Message], chat: str, *given: Any
    ) -> AsyncIterator[Shown]:
        """The last question is asked anew."""
        last = max((i for i, entry in enumerate(history) if entry["role"] == "user"), default=-1)
        async for shown in self._answered(request, _asking_box(), history[: last + 1], chat, given):
            yield shown

    async def ask_edited(
        self, request: gr.Request, edit: gr.EditData, history: list[Message], chat: str, *given: Any
    ) -> AsyncIterator[Shown]:
        """A question is asked with other words; what came after it is gone."""
        index = edit.index[0] if isinstance(edit.index, (list, tuple)) else edit.index
        files = takewhile(lambda entry: entry["role"] == "user", history[index + 1 :])
        edited = [*history[:index], {"role": "user", "content": edit.value}, *files]
        async for shown in self._answered(request, _asking_box(), edited, chat, given):
            yield shown

    async def ask_example(
        self, request: gr.Request, picked: gr.SelectData, history: list[Message], chat: str, *given: Any
    ) -> AsyncIterator[Shown]:
        """One of the examples is asked; the browser says which, and its files are ours."""
        _, profile = await self.served(given[-1], request)
        question = question_of(examples(profile)[picked.index])
        async for shown in self._answered(request, _asking_box(), [*_ended(history), *question], chat, given):
            yield shown

    def stopped(self, history: list[Message], chat: str) -> Shown:
        """The answer so far is kept."""
        history = _ended(history)
        return idle_box(), history, chat, _to_keep(chat, history)

    def opened(self, kept: Any) -> Shown:
        """A conversation `{"id", "entries"}` that the browser kept is shown; an empty one if it kept none."""
        history = from_stored(kept.get("entries"), Path(get_upload_folder())) if isinstance(kept, dict) else []
        chat = str(kept.get("id") or "") if history else ""
        return idle_box(), history, chat, {"id": chat}

    def new(self) -> Shown:
        """An empty conversation is shown."""
        return idle_box(), [], "", {"id": ""}

    async def served(self, key: str, request: gr.Request) -> tuple[list[str], str]:
        """The models that may be asked for, and their profile; what is wrong is told with the first answer."""
        try:
            models = [entry async for entry in self.asking(key, request).models.list(timeout=10)]
        except openai.APIError:
            models = []
        profiles = [str((entry.model_extra or {}).get("profile", "")) for entry in models]
        return [entry.id for entry in models] or [self.model], (profiles or [""])[0]

    async def _answered(
        self,
        request: gr.Request,
        box: gr.MultimodalTextbox,
        history: list[Message],
        chat: str,
        given: tuple[Any, ...],
    ) -> AsyncIterator[Shown]:
        model, system, temperature, max_tokens, key = given
        settings = Settings(model or self.model, system or "", temperature or "", max_tokens or "")
        chat = chat or uuid.uuid4().hex
        yield box, history, chat, await asyncio.to_thread(_to_keep, chat, history)
        reply: list[Message] = []
        async with aclosing(answer(self.asking(key, request), history, settings)) as replies:
            async for reply in replies:
                yield gr.skip(), [*history, *reply], gr.skip(), gr.skip()
        history = [*history, *reply]
        yield idle_box(), history, chat, await asyncio.to_thread(_to_keep, chat, history)

    def asking(self, typed_key: str | None, request: gr.Request) -> openai.AsyncOpenAI:
        """The client with a visitor's key: typed, or the one with which the page was asked for."""
        key = typed_key or presented_key(request.headers.get("authorization", ""), or_password=True)
        return self._client.with_options(api_key=key) if key else self._client


def idle_box() -> gr.MultimodalTextbox:
    """The box while nothing is asked, whatever stands in it."""
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)


def welcome(model: str, profile: str) -> gr.Chatbot:
    """What an empty conversation shows."""
    return gr.Chatbot(placeholder=about(model, profile), examples=examples(profile))


def _asking_box(**more: Any) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(submit_btn=False, stop_btn=True, **more)


def _ended(history: list[Message]) -> list[Message]:
    """A history whose last question has an answer, if only that it was stopped."""
    return [*history, *to_reply([], "", "Stopped.")] if history and history[-1]["role"] == "user" else history


def _to_keep(chat: str, history: list[Message]) -> Message:
    return {"id": chat, "title": title_of(history), "entries": to_stored(history)}
