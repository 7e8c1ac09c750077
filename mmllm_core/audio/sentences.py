"""Timed words of a window -> segments that can be read under a picture: sentences, and parts of long ones.

Does not know how words were timed.
"""

from collections.abc import Iterator, Sequence

from mmllm_core.audio.engine import Decoded
from mmllm_core.audio.transcript import Segment, Word
from mmllm_core.audio.windows import Window

_ENDS = (".", "?", "!", "…", "\u3002", "\uff1f", "\uff01")  # the last three are Chinese and Japanese
_QUOTES = "\"'\u201d\u2019)]"
_LEAST_SECONDS = 1.0
"""Of a sentence: "Mr." is none."""
_PAUSE_SECONDS = 1.0
_LONGEST_SECONDS = 10.0
_MOST_CHARACTERS = 160


def sentences(window: Window, decoded: Decoded) -> Iterator[Segment]:
    """Split what was said in a window after sentences, in pauses, and where it gets long.

    Args:
        decoded: with words; without, it is one segment as long as the window.
    """
    if not decoded.words:
        yield segment_of(decoded, window.start, window.end, decoded.text, decoded.tokens)
        return
    timed = [Word(*window.in_clip(word.start, word.end), word.text) for word in decoded.words]
    held: list[Word] = []
    for word, following in zip(timed, [*timed[1:], None], strict=True):
        held.append(word)
        if following is None or _ends(held, following):
            text = "".join(word.text for word in held)
            yield segment_of(decoded, held[0].start, held[-1].end, text, words=tuple(held))
            held = []


def segment_of(
    decoded: Decoded, start: float, end: float, text: str, tokens: tuple[int, ...] = (), words: tuple[Word, ...] = ()
) -> Segment:
    """A part of what was decoded together, with what is known of the whole."""
    return Segment(
        round(start, 2),
        round(end, 2),
        text,
        words,
        tokens,
        decoded.avg_logprob,
        decoded.no_speech_prob,
        decoded.compression_ratio,
        decoded.temperature,
    )


def _ends(held: Sequence[Word], following: Word) -> bool:
    said = held[-1].text.rstrip(_QUOTES)
    parted = following.text[:1].isspace() or not said.isascii()  # "3.5" goes on
    return (
        (said.endswith(_ENDS) and parted and held[-1].end - held[0].start >= _LEAST_SECONDS)
        or following.start - held[-1].end >= _PAUSE_SECONDS
        or following.end - held[0].start > _LONGEST_SECONDS
        or sum(len(word.text) for word in held) + len(following.text) > _MOST_CHARACTERS
    )
