"""What a dataset gives to training and evaluation."""

from dataclasses import dataclass
from pathlib import Path

from mmllm_core.conversation import Message


@dataclass(frozen=True)
class Sample:
    """A conversation and the images that it speaks of, in order of appearance."""

    id: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Question:
    """One question with one right answer about one image."""

    id: str
    image: Path
    question: str
    answer: str
    kind: str
