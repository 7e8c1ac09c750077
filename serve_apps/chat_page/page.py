"""The chat page: text, pictures and speech in one box, streamed answers out.

In: what a person types, uploads or records in the browser. Out: requests to the API at a base URL with the stock
`openai` client, and a conversation on the page. Conversations and settings are kept in the browser; of pictures and
recordings the browser keeps the names under which this page's server holds them for `KEPT_S`.

It knows the HTTP API only: no model, no Ray, no file that Gradio did not hand over. Each request carries the whole
conversation, earlier pictures and recordings included.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
import openai
from fastapi import FastAPI
from gradio.processing_utils import save_file_to_cache, save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image, ImageDraw

from serve_apps.chat_page.answers import Settings, answer, explain
from serve_apps.chat_page.dictation import MAX_SECONDS, Dictation
from serve_apps.chat_page.history import kept, to_json, to_markdown
from serve_apps.chat_page.look import CSS, DOWNLOAD, HEAD, theme
from serve_apps.chat_page.messages import AUDIO_SUFFIXES, IMAGE_SUFFIXES, MAX_FILE_BYTES, Message
from serve_apps.credentials import presented_key

KEPT_S = 7 * 24 * 3600
QUEUE_LOOKS_S = 0.03  # how long a question waits at most until it is taken
STORAGE = {"secret": "mmllm-chat-page", "storage_key": "mmllm-chats"}
"""The same for every start of the server, so that the browser finds its conversations again. What is stored lies in the
visitor's own browser; the secret, which every visitor can read, guards nothing."""

PAGE_OPTIONS: dict[str, Any] = {  # the look and the limits, for `gr.mount_gradio_app` and `Blocks.launch` alike
    "theme": theme(),
    "css": CSS,
    "head": HEAD,
    "max_file_size": MAX_FILE_BYTES,
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
    "show_error": False,
}
ABOUT = """**{model}** answers; CLIP sees and Whisper hears for it. Answers can be wrong.

The *embedded* model is small, for trying things out: it tells shape and colour of one simple drawing, understands
clear English speech, and answers short everyday questions. It cannot read text in pictures, tell what a photo shows,
count, calculate or know the news. The *phi* profile sees photos and answers at length."""


def build_chat_page(base_url: str, model: str, api_key: str = "not-needed") -> gr.Blocks:
    """Build the page that talks to the API at `base_url` (without `/v1`) and asks for `model` at first.

    It asks with the key that a visitor typed, else the one with which the page itself was asked for, else `api_key`.
    """
    page = _Page(
        openai.AsyncOpenAI(
            base_url=f"{base_url.rstrip('/')}/v1",
            api_key=api_key,
            timeout=openai.Timeout(300, connect=5),
            max_retries=1,
        ),
        model,
    )
    # Gradio skips its check that a visitor's file was uploaded here until `launch`, which a mounted page never reaches.
    page.has_launched = True
    # It looks for questions a thousand times a second, which took the ingress a third of its interpreter's time.
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = QUEUE_LOOKS_S
    return page


def mount_chat_page(app: FastAPI, base_url: str, model: str, path: str = "/", api_key: str = "not-needed") -> FastAPI:
    """Mount the page in `app`, after the routes that are already declared there."""
    return gr.mount_gradio_app(app, build_chat_page(base_url, model, api_key), path=path, **PAGE_OPTIONS)


class _Page(gr.ChatInterface):
    """Gradio's chat, with one sidebar for conversations, settings and export, and with dictation under the box."""

    def __init__(self, client: openai.AsyncOpenAI, model: str):
        self._client = client
        self._model = model
        self._settings = [
            gr.Dropdown([model], value=model, label="Model", allow_custom_value=True, render=False),
            gr.Textbox(label="System prompt", placeholder="none", lines=2, max_length=20_000, render=False),
            gr.Number(None, label="Temperature", placeholder="as served", minimum=0, maximum=2, step=0.1, render=False),
            gr.Number(None, label="Tokens at most", placeholder="as served", minimum=1, precision=0, render=False),
            gr.Textbox(label="API key", type="password", placeholder="none", max_length=1000, render=False),
        ]
        super().__init__(
            self._chat,
            multimodal=True,
            title="mmllm",
            chatbot=gr.Chatbot(
                label="Conversation",
                show_label=False,
                scale=1,
                feedback_options=None,
                buttons=["copy"],
                placeholder=f"### What shall we look at?\n\n{ABOUT.format(model=model)}",
            ),
            textbox=gr.MultimodalTextbox(
                label="Your message",
                elem_id="message",
                sources=["upload", "microphone"],
                file_types=[*IMAGE_SUFFIXES, *AUDIO_SUFFIXES],
                file_count="multiple",
                placeholder="Ask something. Add a picture, or speak.",
                max_plain_text_length=100_000,
                stop_btn=True,
                autofocus=True,
            ),
            additional_inputs=self._settings,
            editable=True,
            save_history=True,
            examples=[[example] for example in _examples()],
            cache_examples=False,
            concurrency_limit=None,
            delete_cache=(600, KEPT_S),
            analytics_enabled=False,
            api_name="chat",
        )
        self.saved_conversations.secret, self.saved_conversations.storage_key = (
            STORAGE["secret"],
            STORAGE["storage_key"],
        )
        with self:
            self._remember_settings()
            self._remember_open_chat()
            self._take_dictation()
            for button, written, name in self._exports:
                button.click(
                    written, [self.chatbot_state], [self._written], queue=False, api_visibility="private"
                ).then(None, [self._written], None, js=DOWNLOAD.replace("NAME", name))

    def _render_header(self) -> None:
        """None: the conversation has the room; name and explanation stand where it is empty."""

    def _render_history_area(self) -> None:
        with gr.Sidebar(label="Conversations and settings", width=280):
            gr.Markdown("# mmllm")
            super()._render_history_area()
            with gr.Accordion("Settings", open=False):
                for component in self._settings:
                    component.render()
                self._keep_key = gr.Checkbox(False, label="Keep the key in this browser")
            with gr.Row():
                markdown, json = gr.Button("Save as Markdown", size="sm"), gr.Button("as JSON", size="sm")
            self._exports = [(markdown, to_markdown, "chat.md"), (json, to_json, "chat.json")]
            self._written = gr.Textbox(visible=False)

    def _render_footer(self) -> None:
        super()._render_footer()
        with gr.Accordion("Dictate", open=False):
            self._microphone = gr.Audio(
                sources=["microphone"],
                streaming=True,
                label=f"Words appear in the box while you speak, {MAX_SECONDS} s",
            )

    def _clear_and_save_textbox(self, message: Message) -> tuple[gr.MultimodalTextbox, Message]:
        return gr.MultimodalTextbox("", interactive=False), message  # Gradio would drop the placeholder too

    def _load_conversation(self, index: int, conversations: list[list[Message]]) -> tuple[int, gr.Chatbot]:
        return index, gr.Chatbot(value=kept(conversations[index], Path(get_upload_folder())))

    def _asking(self, typed_key: str | None, request: gr.Request) -> openai.AsyncOpenAI:
        key = typed_key or presented_key(request.headers.get("authorization", ""), or_password=True)
        return self._client.with_options(api_key=key) if key else self._client

    async def _chat(
        self,
        message: Message,
        history: list[Message],
        request: gr.Request,
        model: str | None = None,
        system: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        api_key: str | None = None,
    ) -> AsyncIterator[list[Message]]:
        settings = Settings(model or self._model, system or "", temperature, max_tokens)
        async for reply in answer(self._asking(api_key, request), history, message, settings):
            yield reply

    def _remember_settings(self) -> None:
        stored = gr.BrowserState({}, storage_key="mmllm-settings", secret=STORAGE["secret"])
        all_settings = [*self._settings, self._keep_key]

        def keep(*values: Any) -> dict[str, Any]:
            *settings, key, keeps = values
            return {"settings": settings, "key": key if keeps else "", "keeps": bool(keeps)}

        async def restore(stored: dict[str, Any], request: gr.Request) -> list[Any]:
            key = stored.get("key") or ""
            try:
                names = [entry.id async for entry in self._asking(key, request).models.list()]
            except openai.APIError:
                names = []  # what is wrong is told with the first answer
            names = names or [self._model]
            if "settings" not in stored:  # a first visit: what is typed meanwhile shall stay
                return [gr.Dropdown(names), *[gr.skip()] * 5]
            model, system, temperature, max_tokens = stored["settings"]
            chosen = model if model in names else names[0]
            return [gr.Dropdown(names, value=chosen), system, temperature, max_tokens, key, bool(stored.get("keeps"))]

        self.load(restore, [stored], all_settings, api_visibility="private", show_progress="hidden")
        for component in all_settings:
            component.input(keep, all_settings, [stored], queue=False, api_visibility="private", show_progress="hidden")

    def _remember_open_chat(self) -> None:
        opened = gr.BrowserState(None, storage_key="mmllm-open-chat", secret=STORAGE["secret"])

        def reopen(index: int | None, chats: list[list[Message]] | None) -> tuple[Any, ...]:
            if index is None or not chats or not 0 <= index < len(chats):
                return None, [], []
            chat = kept(chats[index], Path(get_upload_folder()))
            return index, chat, chat

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.load(
            reopen,
            [opened, self.saved_conversations],
            [self.conversation_id, self.chatbot, self.chatbot_value],
            **quiet,
        )
        self.conversation_id.change(lambda index: index, [self.conversation_id], [opened], queue=False, **quiet)

    def _take_dictation(self) -> None:
        taking = gr.State(None)
        key = self._settings[-1]

        def begin(message: Message | None) -> Dictation:
            return Dictation((message or {}).get("text") or "", (message or {}).get("files") or [])

        async def write(taking: Dictation | None, api_key: str, request: gr.Request) -> tuple[Any, Dictation]:
            taking = taking or Dictation()
            try:
                await taking.hear(self._asking(api_key, request))
            except openai.APIError as error:
                gr.Warning(explain(error))
            return {"text": taking.text, "files": taking.files}, taking

        async def listen(
            sound: tuple[int, Any] | None, taking: Dictation | None, api_key: str, request: gr.Request
        ) -> tuple[Any, Dictation]:
            taking = taking or Dictation()
            if sound is not None:
                taking.add(*sound)
            return await write(taking, api_key, request) if taking.may_hear else (gr.skip(), taking)

        microphone, box = self._microphone, self.textbox
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        microphone.start_recording(begin, [box], [taking], queue=False, **quiet)
        microphone.stream(
            listen,
            [microphone, taking, key],
            [box, taking],
            stream_every=1,
            time_limit=MAX_SECONDS,
            concurrency_limit=None,
            **quiet,
        )
        microphone.stop_recording(write, [taking, key], [box, taking], concurrency_limit=None, **quiet)


def _examples() -> list[Message]:
    folder = get_upload_folder()
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).polygon([(32, 8), (58, 54), (6, 54)], fill="blue")
    triangle = save_pil_to_cache(picture, folder, name="triangle", format="png")
    examples: list[Message] = [{"text": "What colour is the triangle?", "files": [triangle]}]
    examples.append({"text": "Why is the sky blue?", "files": []})
    voice = Path(gr.__file__).parent / "media_assets" / "audio" / "heath_ledger.mp3"
    if voice.is_file():
        examples.append({"text": "What does the speaker say?", "files": [save_file_to_cache(voice, folder)]})
    return examples
