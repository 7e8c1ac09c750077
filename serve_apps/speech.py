"""What is asked of Whisper about a clip, and how what was heard comes back: piece by piece. Does not know HTTP."""

from dataclasses import dataclass

from mmllm_core.audio import Segment, SpeechTask
from serve_apps.upload import Upload


@dataclass(frozen=True)
class SpeechCall:
    """A clip and what shall be done with it.

    Args:
        max_seconds: above which the clip is refused.
    """

    clip: Upload
    task: SpeechTask
    max_seconds: float


@dataclass(frozen=True)
class Heard:
    """A piece of a transcript; the first has no segments, and comes before any is decoded.

    Args:
        language: code of the language that is spoken; None if nobody speaks and none was given.
        seconds: length of the clip.
    """

    language: str | None
    seconds: float
    segments: tuple[Segment, ...] = ()
