"""The chat page: text, pictures and speech in one box, streamed answers out.

In: what a person types, uploads or records in the browser. Out: requests to `{base_url}/v1/chat/completions` with the
stock `openai` client, and a conversation on the page. What was heard comes back with the answer and is shown above it.

It knows the HTTP API only: no model, no Ray, no file that Gradio did not hand over. The page holds no conversation
between visits; each request carries the whole of it, earlier pictures and recordings included.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
import openai
from fastapi import FastAPI
from gradio.processing_utils import save_file_to_cache, save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image, ImageDraw

from mmllm_core.errors import MmllmError
from serve_apps.credentials import presented_key

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
AUDIO_SUFFIXES = (".wav", ".mp3", ".m4a", ".flac", ".ogg", ".opus", ".webm", ".aac")
MAX_FILE_BYTES = 16 * 2**20  # 22.4 MB as base64: one such file fits into a request
QUEUE_LOOKS_S = 0.03  # how long a question waits at most until it is taken
HEARD, NOTICE = "heard", "notice"  # metadata ids of what the page adds to an answer; never sent back to the model

FONTS, MONO = ["system-ui", "Segoe UI", "sans-serif"], ["ui-monospace", "Menlo", "monospace"]
CSS = """
.examples .example {border: 1px solid var(--border-color-primary); border-radius: 10px}
.message .prose blockquote {margin: 0 !important}
.message-buttons-right {display: none}
"""
PAGE_OPTIONS: dict[str, Any] = {  # the look and the limits, for `gr.mount_gradio_app` and `Blocks.launch` alike
    "theme": gr.themes.Soft(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO),
    "css": CSS,
    "max_file_size": MAX_FILE_BYTES,
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
    "show_error": False,
}

Message = dict[str, Any]


class QuestionError(MmllmError):
    """A question that the page cannot send: empty, too large, or of a kind that nobody here reads."""


def build_chat_page(base_url: str, model: str, api_key: str = "not-needed") -> gr.Blocks:
    """Build the page that talks to the API at `base_url` (without `/v1`) and asks for `model`.

    It asks with the key with which the page itself was asked for, and with `api_key` where there was none.
    """
    client = openai.AsyncOpenAI(
        base_url=f"{base_url.rstrip('/')}/v1", api_key=api_key, timeout=openai.Timeout(300, connect=5), max_retries=1
    )

    async def chat(message: Message, history: list[Message], request: gr.Request) -> AsyncIterator[list[Message]]:
        key = presented_key(request.headers.get("authorization", ""), or_password=True)
        asking = client.with_options(api_key=key) if key else client
        heard: list[str] = []
        text, notice = "", ""
        try:
            messages: Any = await asyncio.to_thread(to_messages, history, message)
            recordings = sum(part["type"] == "input_audio" for part in messages[-1]["content"])
            async with await asking.chat.completions.create(model=model, messages=messages, stream=True) as stream:
                async for chunk in stream:
                    transcripts = (chunk.model_extra or {}).get("transcripts") or []
                    heard += transcripts[-recordings:] if recordings else []  # earlier recordings were sent again
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    yield to_reply(heard, text)
            notice = "" if text else "The answer came back empty. Try again, or ask in another way."
        except (openai.APIError, OSError, QuestionError) as error:
            notice = explain(error)
        if notice:
            yield to_reply(heard, text, notice)

    page = gr.ChatInterface(
        chat,
        multimodal=True,
        title="mmllm",
        description=f"<center>CLIP sees, Whisper hears, <b>{model}</b> answers.</center>",
        chatbot=gr.Chatbot(show_label=False, scale=1, feedback_options=None, buttons=["copy"]),
        textbox=gr.MultimodalTextbox(
            sources=["upload", "microphone"],
            file_types=[*IMAGE_SUFFIXES, *AUDIO_SUFFIXES],
            file_count="multiple",
            placeholder="Ask something. Add a picture, or speak.",
            max_plain_text_length=100_000,
            stop_btn=True,
            autofocus=True,
        ),
        examples=_examples(),
        cache_examples=False,
        concurrency_limit=None,
        delete_cache=(600, 24 * 3600),
        analytics_enabled=False,
        api_name="chat",
    )
    # Gradio skips its check that a visitor's file was uploaded here until `launch`, which a mounted page never reaches.
    page.has_launched = True
    # It looks for questions a thousand times a second, which took the ingress a third of its interpreter's time.
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = QUEUE_LOOKS_S
    return page


def mount_chat_page(app: FastAPI, base_url: str, model: str, path: str = "/", api_key: str = "not-needed") -> FastAPI:
    """Mount the page in `app`, after the routes that are already declared there."""
    mounted: FastAPI = gr.mount_gradio_app(app, build_chat_page(base_url, model, api_key), path=path, **PAGE_OPTIONS)
    return mounted


def to_messages(history: list[Message], new_message: Message) -> list[Message]:
    """Turn the page's history and the new `{"text", "files"}` into API messages.

    Turns without an answer (refused, failed, stopped early) are left out, so one bad file cannot spoil the rest.
    """
    messages: list[Message] = []
    asked: Any = None
    for entry in history:
        if (entry.get("metadata") or {}).get("id") in (HEARD, NOTICE):
            continue
        if entry["role"] == "user":
            asked = entry["content"]
        elif asked and (text := "".join(part.get("text", "") for part in _to_parts(entry["content"]))):
            messages += [{"role": "user", "content": _to_parts(asked)}, {"role": "assistant", "content": text}]
            asked = None
    files = [file if isinstance(file, dict) else {"path": file} for file in new_message.get("files") or []]
    question = _to_parts([*files, new_message.get("text") or ""])
    if not question:
        raise QuestionError("Type a question, or add a picture or a recording.")
    return [*messages, {"role": "user", "content": question}]


def to_reply(heard: list[str], text: str, notice: str = "") -> list[Message]:
    """What the page shows for one answer: what was heard, the answer so far, and what went wrong."""
    quotes = "\n".join(f"> Heard: {' '.join(line.split()) or '(no speech)'}" for line in heard)
    shown = [(quotes, HEARD), (text, ""), (notice and f"⚠️ {notice}", NOTICE)]
    return [
        {"role": "assistant", "content": content} | ({"metadata": {"id": kind}} if kind else {})
        for content, kind in shown
        if content
    ]


def explain(error: Exception) -> str:
    """Say for a person what went wrong and what to do."""
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
            return "A file of this conversation is no longer here. Clear the conversation and add it again."
        case _:
            return str(error)


def _to_parts(content: Any) -> list[Message]:
    """API parts of a message's content; Gradio gives a string, or strings, text items and file items."""
    parts: list[Message] = []
    for item in content if isinstance(content, list) else [content]:
        text = item if isinstance(item, str) else item.get("text")
        if text is None:
            parts.append(_file_part(Path((item.get("file") or item)["path"])))
        elif text.strip():
            parts.append({"type": "text", "text": text})
    return parts


def _file_part(path: Path) -> Message:
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES + AUDIO_SUFFIXES:
        raise QuestionError(f"{path.name} is neither a picture nor a recording that can be read here.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise QuestionError(f"{path.name} is larger than {MAX_FILE_BYTES // 2**20} MB.")
    data = base64.b64encode(path.read_bytes()).decode()
    kind = suffix[1:]
    if suffix in AUDIO_SUFFIXES:
        return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind.replace('jpg', 'jpeg')};base64,{data}"}}


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
