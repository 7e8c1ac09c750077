"""The chat page: text, pictures and speech in one box, streamed answers out.

In: what a person types, uploads or says in the browser. Out: requests to the API at a base URL with the stock `openai`
client, and a conversation on the page. Conversations and settings are kept in the browser; pictures and recordings on
this page's server, for `KEPT_S` at most and until it ends.

It knows the HTTP API only: no model, no Ray, no file that Gradio did not hand over. Each request carries the whole
conversation, earlier pictures and recordings included. Here is what stands where, and what sets off what.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
import openai
from fastapi import FastAPI
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from serve_apps.chat_page import look
from serve_apps.chat_page.answers import explain
from serve_apps.chat_page.dictation import MAX_SECONDS, Dictation
from serve_apps.chat_page.history import to_json, to_markdown
from serve_apps.chat_page.messages import AUDIO_SUFFIXES, IMAGE_SUFFIXES, MAX_FILE_BYTES
from serve_apps.chat_page.talk import Shown, Talk, welcome

KEPT_S = 7 * 24 * 3600
QUEUE_LOOKS_S = 0.03  # how long a question waits at most until it is taken

PAGE_OPTIONS: dict[str, Any] = {  # the look and the limits, for `gr.mount_gradio_app` and `Blocks.launch` alike
    "theme": look.theme(),
    "css": look.CSS,
    "head": look.HEAD,
    "max_file_size": MAX_FILE_BYTES,
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
    "show_error": False,
}
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build_chat_page(base_url: str, model: str, api_key: str = "not-needed") -> gr.Blocks:
    """Build the page that talks to the API at `base_url` (without `/v1`) and asks for `model` at first.

    It asks with the key that a visitor typed, else the one with which the page itself was asked for, else `api_key`.
    """
    client = openai.AsyncOpenAI(
        base_url=f"{base_url.rstrip('/')}/v1",
        api_key=api_key,
        timeout=openai.Timeout(300, connect=5),
        max_retries=1,
    )
    page = _Page(Talk(client, model)).blocks
    # Gradio skips its check that a visitor's file was uploaded here until `launch`, which a mounted page never reaches.
    page.has_launched = True
    # It looks for questions a thousand times a second, which took the ingress a third of its interpreter's time.
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = QUEUE_LOOKS_S
    return page


def mount_chat_page(app: FastAPI, base_url: str, model: str, path: str = "/", api_key: str = "not-needed") -> FastAPI:
    """Mount the page in `app`, after the routes that are already declared there."""
    mounted: FastAPI = gr.mount_gradio_app(app, build_chat_page(base_url, model, api_key), path=path, **PAGE_OPTIONS)
    return mounted


class _Page:
    """A sidebar with conversations and settings; beside it the conversation, and the box under it."""

    def __init__(self, talk: Talk):
        self._talk = talk
        with gr.Blocks(
            title="mmllm", analytics_enabled=False, fill_height=True, fill_width=True, delete_cache=(600, KEPT_S)
        ) as self.blocks:
            with gr.Sidebar(label="Conversations and settings", width=290, open=False) as sidebar:
                gr.Markdown("# mmllm")
                self._new = gr.Button("New chat", variant="primary")
                self._chats = gr.HTML(
                    html_template=look.CHATS_HTML,
                    css_template=look.CHATS_CSS,
                    js_on_load=look.CHATS_JS,
                    apply_default_css=False,
                )
                self._settings, self._keep_key = self._place_settings()
                with gr.Row():
                    exports = gr.Button("Save as Markdown", size="sm"), gr.Button("Save as JSON", size="sm")
            with gr.Column(elem_id="talk"):
                self._talked = gr.Chatbot(
                    label="Conversation",
                    show_label=False,
                    elem_id="conversation",
                    scale=1,
                    feedback_options=None,
                    editable="user",
                    buttons=["copy"],
                )
                self._words = gr.Textbox(label="Heard so far", interactive=False, visible=False, elem_id="words")
                self._box = gr.MultimodalTextbox(
                    label="Your message",
                    show_label=False,
                    elem_id="message",
                    sources=["upload"],
                    file_types=[*IMAGE_SUFFIXES, *AUDIO_SUFFIXES],
                    file_count="multiple",
                    placeholder="Ask something. Add pictures or sound, or record.",
                    max_plain_text_length=100_000,
                    autofocus=True,
                )
                self._microphone = gr.Audio(
                    sources=["microphone"], streaming=True, label="Speak", show_label=False, elem_id="microphone"
                )
            self._chat = gr.Textbox("", visible=False)  # id of the open conversation
            self._shown = [self._box, self._talked, self._chat, self._chats]
            self._converse()
            self._remember_settings()
            self._dictate()
            self._export(exports)
            gr.on(
                [self.blocks.load, self._new.click, self._chats.select],
                None,
                None,
                [sidebar],
                js=look.SHOW_SIDEBAR,
                **QUIET,
            )

    def _place_settings(self) -> tuple[list[Any], gr.Checkbox]:
        with gr.Accordion("Settings", open=False):
            settings = [
                gr.Dropdown([self._talk.model], value=self._talk.model, label="Model", allow_custom_value=True),
                gr.Textbox("", label="System prompt", placeholder="none", lines=2, max_length=20_000),
                gr.Textbox(
                    "", label="Temperature", placeholder="as served", max_length=20
                ),  # a gr.Number is never empty
                gr.Textbox("", label="Tokens at most", placeholder="as served", max_length=20),
                gr.Textbox("", label="API key", type="password", placeholder="none", max_length=1000),
            ]
            return settings, gr.Checkbox(False, label="Keep the key in this browser")

    def _converse(self) -> None:
        talk, shown = self._talk, self._shown
        state = [self._talked, self._chat, *self._settings]
        asking: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "trigger_mode": "once"}
        answers = [
            self._box.submit(talk.ask, [self._box, *state], shown, api_name="chat", **asking),
            self._talked.retry(talk.ask_again, state, shown, api_visibility="private", **asking),
            self._talked.edit(talk.ask_edited, state, shown, api_visibility="private", **asking),
            self._talked.example_select(talk.ask_example, state, shown, api_visibility="private", **asking),
        ]
        ending: dict[str, Any] = {"cancels": answers, "queue": False, **QUIET}
        self._box.stop(talk.stopped, [self._talked, self._chat], shown, **ending)
        gr.on([self._new.click, self._chats.clear, self._talked.clear], talk.new, None, shown, **ending)
        self._chats.select(self._open_picked, None, shown, **ending)
        self.blocks.load(self._open_latest, [self._chats], shown, js=look.OPEN_CHAT, queue=False, **QUIET)

    def _open_picked(self, event: gr.EventData) -> Shown:
        return self._talk.opened(event._data)

    def _open_latest(self, kept: Any) -> Shown:
        return self._talk.opened(kept)

    def _remember_settings(self) -> None:
        all_settings = [*self._settings, self._keep_key]
        model, *_, key = self._settings

        async def greet(model: str, key: str, request: gr.Request) -> list[Any]:
            names, profile = await self._talk.served(key, request)
            chosen = gr.Dropdown(names, value=model if model in names else names[0])
            return [welcome(names[0], profile), chosen]

        # First in the browser alone: what comes from the server later would undo what is typed meanwhile.
        self.blocks.load(None, None, all_settings, js=look.RESTORE_SETTINGS, **QUIET).then(
            greet, [model, key], [self._talked, model], concurrency_limit=None, **QUIET
        )
        typed = [each.blur for each in self._settings]  # besides, for what is pasted is no input to Gradio
        set_ = [*typed, *(each.input for each in all_settings)]
        gr.on(set_, None, all_settings, None, js=look.KEEP_SETTINGS, **QUIET)

    def _dictate(self) -> None:
        microphone, words, key = self._microphone, self._words, self._settings[-1]
        taken, recording = gr.State(None), gr.File(visible=False)

        async def write(request: gr.Request, taken: Dictation | None, key: str) -> tuple[Any, Dictation]:
            taken = taken or Dictation()
            client = self._talk.asking(key, request)
            try:
                await taken.hear(client)
            except openai.APIError as error:
                gr.Warning(explain(error, str(client.base_url)))
            return gr.Textbox(taken.heard, visible=True), taken

        async def listen(
            request: gr.Request, sound: tuple[int, Any] | None, taken: Dictation | None, key: str
        ) -> tuple[Any, Dictation]:
            taken = taken or Dictation()
            if sound is not None:
                taken.add(*sound)
            return await write(request, taken, key) if taken.may_hear else (gr.skip(), taken)

        def end(taken: Dictation | None) -> tuple[Any, str | None]:
            unheard = taken.wav() if taken and taken.failed else None
            folder = get_upload_folder()
            return gr.Textbox(visible=False), save_bytes_to_cache(unheard, "speech.wav", folder) if unheard else None

        microphone.start_recording(Dictation, None, [taken], queue=False, **QUIET)
        microphone.stream(
            listen,
            [microphone, taken, key],
            [words, taken],
            stream_every=1,
            time_limit=MAX_SECONDS,
            concurrency_limit=None,
            **QUIET,
        )
        microphone.stop_recording(write, [taken, key], [words, taken], concurrency_limit=None, **QUIET).then(
            end, [taken], [words, recording], queue=False, **QUIET
        ).then(None, [self._box, words, recording], [self._box, words, recording], js=look.ADD_SAID, **QUIET)

    def _export(self, buttons: tuple[gr.Button, gr.Button]) -> None:
        written = gr.Textbox(visible=False)
        for button, write, name in zip(buttons, (to_markdown, to_json), ("chat.md", "chat.json"), strict=True):
            button.click(write, [self._talked], [written], queue=False, **QUIET).then(
                None, [written], None, js=look.DOWNLOAD.replace("NAME", name)
            )
