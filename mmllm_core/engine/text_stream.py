"""Token ids -> text that is certain: whole UTF-8 characters, and never a part of a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"


class TextStream:
    """Detokenizes one sequence step by step.

    Args:
        tokenizer: the LM's tokenizer.
        stop: strings that end the answer; they are not part of it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = [s for s in stop if s]
        self._ids: list[int] = []
        self._start = 0  # ids before it are decoded for good
        self._context = 0  # where the piece before `_start` begins
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token and return the text that it made certain, possibly none."""
        self._ids.append(token)
        window = self._window()
        if window.endswith(_REPLACEMENT):  # a character that goes on in the next token
            return ""
        self._context, self._start = self._start, len(self._ids)
        self._pending += window
        return self._release()

    def flush(self) -> str:
        """Text held back so far; call once, when no token follows."""
        self._pending += self._window()
        self._start = len(self._ids)
        text = self._release()
        if not self.stopped:
            text, self._pending = text + self._pending, ""
        return text

    def _window(self) -> str:
        """Text of the ids after `_start`, decoded behind the piece before them: a space may depend on it.

        That piece is of whole characters. Behind a part of one, tokenizers with byte fallback spoil all the bytes.
        """
        context = self._tokenizer.decode(self._ids[self._context : self._start])
        text: str = self._tokenizer.decode(self._ids[self._context :])[len(context) :]
        return text

    def _release(self) -> str:
        found = [at for at in (self._pending.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._pending = self._pending[: min(found)], ""
            return text
        held = max((_overlap(self._pending, s) for s in self._stop), default=0)
        cut = len(self._pending) - held
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
