"""The peer of `tests.bench.serving`: the same models in one process, as a Space without a serving system runs them.

    python -m tests.bench.naive_peer --bundle FOLDER --port 8001

FastAPI, open_clip, openai-whisper and `generate`, one request after another. More at a time only make each other's
threads wait on CPUs. It speaks as much of OpenAI's chat completions as the bench asks for, and streams each token.
"""

import argparse
import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from transformers import TextIteratorStreamer

from mmllm_core.audio import decode_audio
from mmllm_core.audio.openai_whisper_engine import load_openai_whisper
from mmllm_core.bundle import Bundle
from mmllm_core.conversation import ImagePart, Message, SpeechPart, TextPart, render
from mmllm_core.merging import merge_adapter
from mmllm_core.vision import decode_image


class Peer:
    """All models of a bundle."""

    def __init__(self, folder: Path):
        bundle = Bundle.open(folder)
        self._tokenizer = bundle.tokenizer
        self._clip = bundle.load_vision()
        self._whisper = load_openai_whisper(bundle.weights(bundle.profile.audio.source), "cpu")
        self._model = bundle.load_model()
        self._lm: Any = merge_adapter(self._model.lm, self._model.lm.get_input_embeddings().weight.dtype)
        self._n_image_tokens = self._model.connector.n_tokens(bundle.info.n_patches)
        self._max_seconds = bundle.profile.audio.max_seconds
        self._context = bundle.profile.language.context_length
        self._busy = threading.Lock()

    def answer(self, body: dict[str, Any]) -> Iterator[str]:
        """Pieces of the answer."""
        with self._busy:
            messages, images = self._read(body["messages"])
            rendered = render(
                messages,
                self._tokenizer,
                n_image_tokens=self._n_image_tokens,
                max_length=self._context,
                generation_prompt=True,
            )
            streamer = TextIteratorStreamer(self._tokenizer, skip_special_tokens=True)
            arguments = (torch.tensor([rendered.input_ids]), images, body, streamer)
            speaking = threading.Thread(target=self._generate, args=arguments)
            speaking.start()
            yield from streamer
            speaking.join()

    @torch.inference_mode()
    def _generate(self, input_ids: torch.Tensor, images: list[Any], body: dict[str, Any], streamer: Any) -> None:
        features = None
        if images:
            features = torch.from_numpy(self._clip.encode(images)).float()  # (n_images, n_patches, d_vision)
        embedded = self._model.embed(input_ids, features)  # (1, t, d_model)
        self._lm.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long),
            min_new_tokens=body["min_tokens"],
            max_new_tokens=body["max_tokens"],
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id or 0,
            streamer=streamer,
        )

    def _read(self, told: list[dict[str, Any]]) -> tuple[list[Message], list[Any]]:
        messages, images = [], []
        for message in told:
            content = message["content"]
            parts: list[Any] = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    parts.append(TextPart(part["text"]))
                elif part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    images.append(decode_image(data, 2**24, None))
                    parts.append(ImagePart())
                else:
                    waveform = decode_audio(base64.b64decode(part["input_audio"]["data"]), self._max_seconds)
                    parts.append(SpeechPart(self._whisper.transcribe(waveform, fp16=False)["text"].strip()))
            messages.append(Message(message["role"], tuple(parts)))
        return messages, images


def build(peer: Peer) -> FastAPI:
    """The one route."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        if body["stream"]:
            return StreamingResponse(_events(peer.answer(body)), media_type="text/event-stream")
        text = await run_in_threadpool(lambda: "".join(peer.answer(body)))
        return JSONResponse({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        return {"status": "ready"}

    return app


def _events(pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}, 'finish_reason': None}]})}\n\n"
    yield f"data: {json.dumps({'choices': [{'delta': {}, 'finish_reason': 'stop'}]})}\n\ndata: [DONE]\n\n"


def main() -> None:
    """Serve until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args()
    uvicorn.run(build(Peer(arguments.bundle)), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
