"""What every engine takes, gives and promises. Knows embeddings and text; nothing of images or HTTP."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from mmllm_core.connectors import Media

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to end. Temperature 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineRequest:
    """One sequence to complete."""

    id: str
    embeddings: "Tensor"  # (t, d_model)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    media: "Media | None" = None
    """What the LM's layers look at, for models with cross-attention."""


@dataclass(frozen=True)
class EngineChunk:
    """Text that became certain since the last chunk; the last one carries the finish reason."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine is."""

    waiting: int
    running: int
    tokens_in_flight: int


class Engine(Protocol):
    """Both engines keep these promises; one conformance suite tests them.

    Greedy output equals `model.generate`. A request that fails raises `EngineError` from its own iterator and
    leaves the others alone.
    """

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineChunk]:
        """Stream a completion. Closing the iterator aborts the request."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored, for it may just have ended."""
        ...

    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        ...

    def health(self) -> None:
        """Raise `EngineError` if the engine cannot serve any more."""
        ...

    def shutdown(self) -> None:
        """End all requests and free what the engine holds."""
        ...
