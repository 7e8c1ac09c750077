"""What is asked about a clip, and what was heard in it. Does not know how it is heard."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SpeechTask:
    """What shall be done with a clip.

    Args:
        language: a code such as `en`, or a name such as `english`; None has it detected.
        prompt: text that is imagined before the clip: spellings and style follow it.
        temperature: 0 decodes greedily (or by beams) and warms up where that fails; above 0 samples at that alone.
        translate: into English, rather than written down in its own language.
        timed: whether segments are sentences with the times of their words, or as long as they come.
    """

    language: str | None = None
    prompt: str = ""
    temperature: float = 0.0
    translate: bool = False
    timed: bool = False


@dataclass(frozen=True)
class Word:
    """A word as it is written, a space before it where there is one, and when it was said, in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Segment:
    """What was said between two times, in seconds.

    Args:
        text: with the space that parts it from the segment before, if any: texts of segments add up.
        words: where they were asked for.
        tokens: Whisper's.
        avg_logprob, no_speech_prob, compression_ratio, temperature: of the stretch that it was decoded in.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] = ()
    tokens: tuple[int, ...] = ()
    avg_logprob: float = 0.0
    no_speech_prob: float = 0.0
    compression_ratio: float = 0.0
    temperature: float = 0.0


@dataclass(frozen=True)
class Transcript:
    """What was heard in a clip.

    Args:
        language: code of the language that is spoken in it; None if nobody speaks and none was given.
        seconds: length of the clip.
    """

    text: str
    language: str | None
    seconds: float
    segments: tuple[Segment, ...]


def joined(segments: Sequence[Segment]) -> str:
    """The text of a whole clip."""
    return "".join(segment.text for segment in segments).strip()
