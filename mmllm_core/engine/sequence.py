"""One answer on its way: what it asks, what it holds, and what came of it so far. Does not know the LM."""

from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from mmllm_core.engine.call import Call
from mmllm_core.engine.grammar import Grammar
from mmllm_core.engine.page_pool import PageName, PagePool, page_names
from mmllm_core.engine.paged_attention import PAGE
from mmllm_core.engine.protocol import EngineChunk, FinishReason, TokenLogprob
from mmllm_core.engine.rope import Rope
from mmllm_core.engine.sampler import Choice, SamplingState
from mmllm_core.engine.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Sequence:
    """One of a call's answers.

    Args:
        limit: positions that prompt and answer may take together.
        after: the answer to the same prompt that is computed first, whose pages this one shares.
        rope: how its positions are told (`mmllm_core.engine.step.Step.rope_of`).
        shares: whether others may go on from its pages, and it from theirs.
    """

    def __init__(
        self,
        call: Call,
        index: int,
        limit: int,
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: list[int],
        after: "Sequence | None" = None,
        rope: Rope = "near",
        shares: bool = True,
    ):
        request = call.request
        self.call = call
        self.index = index
        self.limit = limit
        self.after = after
        self.rope: Rope = rope
        self.stop_ids = stop_ids
        self.text = TextStream(tokenizer, request.sampling.stop)
        self._keys = request.keys if shares else None
        self._root = f"{rope}{request.namespace}".encode()
        prompt = frozenset(key for key in request.keys or () if key >= 0)
        grammar = None if call.grammar is None else Grammar(call.grammar)
        self.sampling = SamplingState(request.sampling, index, prompt, stop_ids, grammar)
        self.token_ids: list[int] = []
        self.embeddings: Tensor | None = None  # (t, d_model) of the prompt, while it is computed
        self.pages: list[int] = []
        self.n_computed = 0
        """Positions whose keys and values are in the cache."""
        self.cached_tokens = 0
        self.finished = False
        self._names: list[PageName] = []
        self._logprobs: list[TokenLogprob] = []
        self._sent = 0

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt."""
        return self.call.request.prompt_tokens

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.n_computed >= self.prompt_tokens

    @property
    def ready(self) -> bool:
        """Whether it need not wait for another answer to its prompt."""
        return self.after is None or self.after.finished or self.after.decoding

    @cached_property
    def _prompt_names(self) -> list[PageName]:
        """Names of the pages that may be found; it may ask for them at many steps before there is room."""
        return page_names(self._keys or (), self._root)[: (self.prompt_tokens - 1) // PAGE]

    def admit(self, pool: PagePool) -> bool:
        """Take all pages that it may ever need, shared ones where its prompt was computed before; False if too few.

        At least one position of the prompt is left to compute, for its logits.
        """
        names = self._prompt_names
        taken = pool.take(-(-self.limit // PAGE), names)
        if taken is None:
            return False
        self.pages, n_found = taken
        self._names = names[:n_found]
        self.n_computed = self.cached_tokens = n_found * PAGE
        return True

    def computed(self, n: int, pool: PagePool) -> None:
        """Note that `n` positions more are in the cache, and let their pages be found again."""
        self.n_computed += n
        if self._keys is None:
            return
        n_full = self.n_computed // PAGE
        if n_full > len(self._names):
            begin = len(self._names) * PAGE
            all_keys = [*self._keys, *self.token_ids]
            names = page_names(all_keys[begin : n_full * PAGE], self._names[-1] if self._names else self._root)
            for page, name in zip(self.pages[len(self._names) :], names, strict=False):
                pool.publish(page, name)
            self._names += names

    def take(self, choice: Choice) -> EngineChunk | None:
        """Take the next token; a chunk if there is something to say."""
        if choice.token in self.stop_ids:
            return self.finish("stop", self.text.flush())
        self.token_ids.append(choice.token)
        if choice.logprob is not None:
            self._logprobs.append(choice.logprob)
        text = self.text.push(choice.token)
        if self.text.stopped:
            return self.finish("stop", text)
        full = self.prompt_tokens + len(self.token_ids) >= self.limit
        if full or len(self.token_ids) >= self.call.request.sampling.max_tokens:
            return self.finish("length", text + self.text.flush())
        return self._chunk(text, None) if text else None

    def finish(self, reason: FinishReason, text: str = "") -> EngineChunk:
        """Its last chunk."""
        self.finished = True
        return self._chunk(text, reason)

    def release(self, pool: PagePool) -> None:
        """Give back what it holds."""
        pool.release(self.pages)
        self.pages = []
        self.embeddings = None

    def _chunk(self, text: str, reason: FinishReason | None) -> EngineChunk:
        new_ids = tuple(self.token_ids[self._sent :])
        logprobs = tuple(self._logprobs[self._sent :])
        self._sent = len(self.token_ids)
        return EngineChunk(
            text,
            new_ids,
            self.prompt_tokens,
            len(self.token_ids),
            reason,
            self.index,
            logprobs,
            self.cached_tokens,
        )
