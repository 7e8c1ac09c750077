"""What the LM is asked, in a module of its own: the HTTP side sends it and should not have to load torch for that."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from mmllm_core.conversation import Message, text_runs
from mmllm_core.engine.protocol import SamplingParams

BLOCK = 256
"""Characters of text that have a name of their own."""
_TEXT, _IMAGE, _END = b"t", b"i", b"e"


@dataclass(frozen=True)
class Prefix:
    """What a conversation begins with, block by block; each name stands for all up to the end of its block."""

    names: tuple[bytes, ...]
    n_system: int
    """Of `names`, those of the system message, which many conversations begin with."""


@dataclass(frozen=True)
class Prompt:
    """What the LM is asked."""

    id: str
    messages: tuple[Message, ...]
    features: NDArray[np.float16] | None  # (n_images, n_patches, d_vision), in order of appearance
    sampling: SamplingParams
    seconds: float | None = None
    """Until its time is up; clocks differ between machines."""
    model: str = ""
    """Who is asked, where several answer."""
    traceparent: str = ""
    """Below which the answer is traced."""

    @cached_property
    def prefix(self) -> Prefix:
        """Names of its beginnings: the same wherever the same text and images come in the same order.

        An image is a block, and so are `BLOCK` characters of a text and what is left of it at a turn's end.
        """
        features = iter(() if self.features is None else self.features)
        names: list[bytes] = []
        n_system = 0
        before = self.model.encode()
        for message in self.messages:
            for piece in _pieces(message, features):
                before = xxh3_128_digest(before + piece)
                names.append(before)
            if message.role == "system":
                n_system = len(names)
        return Prefix(tuple(names), n_system)


def _pieces(message: Message, features: Iterator[NDArray[np.float16]]) -> Iterator[bytes]:
    for i, run in enumerate(text_runs(message)):
        if i > 0:
            image = next(features, None)
            yield _IMAGE + (b"" if image is None else xxh3_128_digest(np.ascontiguousarray(image).data))
        text = message.role[0] + run
        whole = len(text) - len(text) % BLOCK
        yield from (_TEXT + text[at : at + BLOCK].encode() for at in range(0, whole, BLOCK))
        rest = text[whole:]
        if rest:
            yield _TEXT + rest.encode()
    yield _END
