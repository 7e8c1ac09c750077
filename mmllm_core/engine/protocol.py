"""What every engine takes, gives and promises. Knows embeddings and text; nothing of images or HTTP."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mmllm_core.connectors import Media
    from mmllm_core.engine.lora import LoraAdapter

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to end. Temperature 0 is greedy.

    Penalties change logits first, then the temperature divides them; of what is left, `top_k`, `top_p` and `min_p`
    each strike tokens out of the same distribution.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    """Before so many, no token ends the answer; stop strings still do."""
    temperature: float = 0.0
    top_p: float = 1.0
    """The likeliest tokens that together have this probability (arXiv:1904.09751)."""
    top_k: int = 0
    """So many of the likeliest; 0 for all."""
    min_p: float = 0.0
    """Tokens at least this share as likely as the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in prompt or answer (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens in the answer, as often as they are in it."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """Tell each token's log-probability, and those of so many of the likeliest, from the LM's own logits."""
    json_schema: str | None = None
    """A JSON schema, as JSON, that the answer keeps to; the answer ends when it is whole."""
    n: int = 1
    """Answers to the one prompt; each has a seed of its own, drawn from `seed`."""


@dataclass(frozen=True)
class EngineRequest:
    """One prompt to complete: embeddings, or token ids of text alone.

    Raises:
        ValueError: neither or both are given, or `content` is not of the prompt's length.
    """

    id: str
    embeddings: "Tensor | None" = None  # (t, d_model)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    media: "Media | None" = None
    """What the LM's layers look at, for models with cross-attention."""
    token_ids: tuple[int, ...] | None = None
    content: tuple[int, ...] | None = None
    """What stands at each position of `embeddings`: a token id, or a negative number that tells the part of an image
    from all others. Prompts that begin alike share their keys and values; without it nothing is shared."""
    deadline: float | None = None
    """When its time is up, in seconds of `time.monotonic`."""
    adapter: "LoraAdapter | None" = None
    """What is added to the LM for this request, in an engine that takes adapters."""
    namespace: str = ""
    """Prompts of different ones share nothing, for the same content gives other keys and values there."""

    def __post_init__(self) -> None:
        if (self.embeddings is None) == (self.token_ids is None):
            raise ValueError(f"request {self.id}: give embeddings or token ids, one of the two")
        if self.content is not None and len(self.content) != self.prompt_tokens:
            raise ValueError(
                f"request {self.id}: content of {len(self.content)} positions, and the prompt has {self.prompt_tokens}"
            )

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt."""
        return len(self.token_ids if self.token_ids is not None else self.embeddings)  # type: ignore[arg-type]

    @property
    def keys(self) -> tuple[int, ...] | None:
        """What stands at each position, where that is known."""
        return self.token_ids if self.token_ids is not None else self.content


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the LM found a token, before penalties and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, best first."""


@dataclass(frozen=True)
class EngineChunk:
    """Text that became certain since the last chunk of its answer; each answer's last one has the finish reason."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None = None
    index: int = 0
    """Which of the `n` answers."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of `token_ids`, where they were asked for."""
    cached_tokens: int = 0
    """Positions of the prompt whose keys and values were there already."""


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine is."""

    waiting: int
    running: int
    tokens_in_flight: int
    kv_use: float = 0.0
    """Share of the memory for keys and values that running requests hold."""


class Engine(Protocol):
    """All engines keep these promises; one conformance suite tests them.

    Greedy output equals `model.generate`. A request that fails raises `EngineError` from its own iterator and
    leaves the others alone.
    """

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineChunk]:
        """Stream the completions, mixed where there are several. Closing the iterator aborts the request.

        Raises:
            ConversationError: the prompt does not fit the context or the memory for keys and values.
            SchemaError: no answer can be bound to `json_schema`.
            DeadlineError: the request's time is up.
            EngineError: the engine failed on this request or is down.
        """
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


class StartEngine(Protocol):
    """What starts an engine that another package adds (`mmllm.engines`): a class or a function."""

    def __call__(
        self,
        lm: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context_length: int,
        kv_cache_bytes: int,
        max_sequences: int,
        step_tokens: int,
        n_threads: int,
    ) -> Engine:
        """Start.

        Args:
            lm: in eval mode, its adapter merged if `phi.merged`; the engine has it to itself.
            context_length: most positions that prompt and answer may take together.
            kv_cache_bytes: memory for keys and values.
            max_sequences: that run at a time.
            step_tokens: positions that are computed at a time.
            n_threads: CPU threads, on a CPU.

        Raises:
            ConfigError: the engine cannot run such an LM.
            EngineError: it did not start.
        """
        ...
