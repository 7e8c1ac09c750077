"""Ask a running assistant as any application would: over HTTP, with the stock `openai` client."""

import base64
import mimetypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm_core.errors import BadInput, EnvironmentLack, MmllmError


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str
    transcripts: tuple[str, ...] = ()


class Asker:
    """A client of one service.

    Args:
        base_url: of the service, without `/v1`.
        api_key: where the service asks for one.

    Raises:
        EnvironmentLack: nobody answers there.
        MmllmError: the service refused; the message is its own.
    """

    def __init__(self, base_url: str, api_key: str = "local"):
        import openai

        self._client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=api_key, timeout=600)
        try:
            models = self._client.models.list().data
        except openai.APIConnectionError as error:
            raise EnvironmentLack(f"{base_url}: nobody answers: start the assistant with 'make serve'") from error
        except openai.APIStatusError as error:
            raise MmllmError(f"the assistant refused: {error.message}") from error
        if not models:
            raise MmllmError(f"{base_url}: your API key may ask for none of the models that are served there")
        self.model = models[0].id

    def ask(self, messages: list[dict[str, Any]], max_tokens: int = 64) -> Answer:
        """Ask and wait for the whole answer.

        Raises:
            MmllmError: the service refused; the message is its own.
        """
        import openai

        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=max_tokens,
            )
        except openai.APIStatusError as error:
            raise MmllmError(f"the assistant refused: {error.message}") from error
        return Answer(reply.choices[0].message.content or "", _transcripts(reply))

    def stream(self, messages: list[dict[str, Any]], max_tokens: int = 256) -> Iterator[Answer]:
        """Ask and yield the answer in pieces as they come; the first carries what was heard.

        Raises:
            MmllmError: the service refused; the message is its own.
        """
        import openai

        try:
            chunks: Any = self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=max_tokens,
                stream=True,
            )
            for chunk in chunks:
                text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                yield Answer(text, _transcripts(chunk))
        except openai.APIError as error:
            raise MmllmError(f"the assistant refused: {error.message}") from error


def user_message(text: str | None = None, image: Path | None = None, audio: Path | None = None) -> dict[str, Any]:
    """A user's turn in the API's own format.

    Raises:
        BadInput: a file that does not exist.
    """
    parts: list[dict[str, Any]] = []
    if image:
        kind = mimetypes.guess_type(image.name)[0] or "image/png"
        parts.append({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{_base64(image)}"}})
    if audio:
        parts.append({"type": "input_audio", "input_audio": {"data": _base64(audio), "format": audio.suffix[1:]}})
    if text:
        parts.append({"type": "text", "text": text})
    return {"role": "user", "content": parts}


def _transcripts(body: Any) -> tuple[str, ...]:
    """The API's own extension field, which the client keeps beside the fields that it knows."""
    return tuple((body.model_extra or {}).get("transcripts", ()))


def _base64(path: Path) -> str:
    try:
        return base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
