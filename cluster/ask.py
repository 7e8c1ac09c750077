"""Ask a running assistant as any application would: over HTTP, with the stock `openai` client."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.attachment import Attachment
from mmllm_core.errors import EnvironmentLack, MmllmError


@dataclass(frozen=True)
class Answer:
    """What came back, or a piece of it."""

    text: str
    transcripts: tuple[str, ...] = ()
    """What was heard, in every recording of the conversation."""


class Asker:
    """A client of one service.

    Args:
        base_url: of the service, with or without `/v1`.
        api_key: where the service asks for one.
        model: that is asked for; the first that is served if None.

    Raises:
        EnvironmentLack: nobody answers there.
        MmllmError: the service refused, with a message of its own, or serves no such model.
    """

    def __init__(self, base_url: str, api_key: str = "local", model: str | None = None):
        import openai

        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._client = openai.OpenAI(base_url=f"{self.base_url}/v1", api_key=api_key, timeout=600)
        self.models = self._served()
        if not self.models:
            raise MmllmError(f"{base_url}: your API key may ask for none of the models that are served there")
        self.model = self.models[0]
        if model is not None:
            self.choose(model)

    def choose(self, model: str) -> None:
        """Ask for this model from now on.

        Raises:
            MmllmError: it is not served there.
        """
        if model not in self.models:
            raise MmllmError(f"model '{model}' is not served: choose one of {', '.join(self.models)}")
        self.model = model

    def ask(self, messages: Sequence[dict[str, Any]], **settings: Any) -> Answer:
        """Ask and wait for the whole answer.

        Args:
            settings: of the API, such as `max_tokens`.

        Raises:
            EnvironmentLack, MmllmError: as `stream`.
        """
        given: Any = list(messages)
        with self._told():
            reply = self._client.chat.completions.create(model=self.model, messages=given, **settings)
        return Answer(reply.choices[0].message.content or "", _transcripts(reply))

    def stream(self, messages: Sequence[dict[str, Any]], **settings: Any) -> Iterator[Answer]:
        """Ask and yield the answer in pieces as they come; the first carries what was heard.

        Closing the generator ends the request, and with it the work that the service does for it.

        Raises:
            EnvironmentLack: the connection failed.
            MmllmError: the service refused; the message is its own.
        """
        given: Any = list(messages)
        with self._told():
            chunks: Any = self._client.chat.completions.create(
                model=self.model, messages=given, stream=True, **settings
            )
            with closing(chunks):
                for chunk in chunks:
                    text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    yield Answer(text, _transcripts(chunk))

    def _served(self) -> list[str]:
        with self._told():
            return [model.id for model in self._client.models.list().data]

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A failure as one line."""
        import httpx
        import openai

        try:
            yield
        except openai.APITimeoutError as error:
            raise EnvironmentLack(f"{self.base_url}: no answer came in time: ask for something shorter") from error
        except openai.APIConnectionError as error:
            raise EnvironmentLack(
                f"{self.base_url}: nobody answers: start the assistant with 'make serve', or give its --base-url"
            ) from error
        except openai.APIError as error:
            raise MmllmError(f"the assistant refused: {error.message}") from error
        except httpx.TransportError as error:  # while an answer is read, httpx's errors pass through the client
            raise EnvironmentLack(f"{self.base_url}: the connection broke off in the middle of an answer") from error


def user_message(text: str | None = None, image: Path | None = None, audio: Path | None = None) -> dict[str, Any]:
    """A user's turn in the API's own format.

    Raises:
        BadInput: a file that cannot be used, by name.
    """
    attached = [Attachment.read(image, "image")] if image else []
    attached += [Attachment.read(audio, "audio")] if audio else []
    return message_of(text, attached)


def message_of(text: str | None, attached: Sequence[Attachment]) -> dict[str, Any]:
    """As `user_message`, of files that were read before."""
    parts = [attachment.part for attachment in attached]
    if text:
        parts.append({"type": "text", "text": text})
    return {"role": "user", "content": parts}


def _transcripts(body: Any) -> tuple[str, ...]:
    """The API's own extension field, which the client keeps beside the fields that it knows."""
    return tuple((body.model_extra or {}).get("transcripts", ()))
