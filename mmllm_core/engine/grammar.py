"""JSON schemas -> which tokens may come next (xgrammar: Dong et al., 2024, arXiv:2411.15100). Knows nothing of LMs."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmllm_core.engine.json_schema import require_answerable
from mmllm_core.errors import SchemaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_BYTES = 64_000_000
"""For schemas that were asked for before."""


class Grammars:
    """Compiles schemas for one tokenizer, and keeps them.

    Args:
        vocab_size: width of the LM's logits.
        stop_ids: tokens that may follow when an answer is whole.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, stop_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = list(stop_ids)
        self._compiler: Any = None
        self._starting = threading.Lock()

    def compile(self, schema: str) -> Any:
        """A compiled grammar, for as many `Grammar` as there are answers. From any thread; it may take a while.

        JSON is written on one line, with a space after commas and colons: white space without end is no answer.

        Raises:
            SchemaError: it is no JSON schema, asks for what is not known here, or has no answer.
        """
        require_answerable(schema)
        with self._starting:
            if self._compiler is None:
                self._compiler = self._start()
        try:
            return self._compiler.compile_json_schema(schema, any_whitespace=False)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0].partition(": ")[2]
            raise SchemaError(
                f"'response_format': not a JSON schema that answers can keep to: {reason}", "response_format"
            ) from None

    def _start(self) -> Any:
        import xgrammar

        known = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._stop_ids or None
        )
        return xgrammar.GrammarCompiler(known, max_threads=1, cache_limit_bytes=CACHE_BYTES)


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> list[bytes]:
    """The bytes that each token stands for, by its id, whichever way the tokenizer writes bytes."""
    import xgrammar

    return list(xgrammar.TokenizerInfo.from_huggingface(tokenizer).decoded_vocab)


class Grammar:
    """Where one answer is in a grammar.

    Args:
        compiled: by `Grammars.compile`.
    """

    def __init__(self, compiled: Any):
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bitmask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)  # int32 (1, vocab / 32)

    def mask(self, logits: Tensor) -> None:
        """Strike out of logits (vocab,), in place, what may not come next."""
        import xgrammar

        self._matcher.fill_next_token_bitmask(self._bitmask)
        xgrammar.apply_token_bitmask_inplace(logits.unsqueeze(0), self._bitmask.to(logits.device))

    def accept(self, token: int) -> None:
        """Go on by a token that may come next."""
        self._matcher.accept_token(token)
