"""easy-VQA (Victor Zhou, MIT): 64x64 images of one coloured shape and short questions about them.

In: the unpacked data folder. Out: questions, CLIP captions and multi-turn training conversations as rows. Knows the
dataset's thirteen answers and nothing of tokens or features.
"""

import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmllm_core.config import EasyVqaData, PackageSource
from mmllm_core.conversation import ImagePart, Message, TextPart
from mmllm_core.data.rows import Row, row_of
from mmllm_core.data.sample import Question
from mmllm_core.errors import WeightsError
from mmllm_core.models.packages import fetch_package

SOURCE = PackageSource(
    requirement="easy-vqa==1.0",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    folder="easy_vqa/data",
)
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

Split = Literal["train", "test"]


@dataclass(frozen=True)
class ImageQuestions:
    """All that is asked about one image."""

    image: Path
    questions: tuple[Question, ...]

    @property
    def caption(self) -> str | None:
        """`a red circle`, or None where the questions do not give both colour and shape away."""
        told = {word for question in self.questions for word in _affirmed(question)}
        shape = next((word for word in SHAPES if word in told), None)
        colour = next((word for word in COLOURS if word in told), None)
        return f"a {colour} {shape}" if shape and colour else None


def fetch() -> Path:
    """Fetch the dataset's package once and return its data folder."""
    return fetch_package(SOURCE)


def kind_of(answer: str) -> str:
    """Which kind of question an answer belongs to: yes/no, shape or colour."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


def load_split(folder: Path, split: Split) -> list[ImageQuestions]:
    """Read a split, grouped by image in order of image number.

    Raises:
        WeightsError: the folder does not hold the dataset.
    """
    path = folder / split / "questions.json"
    try:
        rows: list[tuple[str, str, int]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error
    by_image: defaultdict[int, list[Question]] = defaultdict(list)
    for row, (question, answer, number) in enumerate(rows):
        image = folder / split / "images" / f"{number}.png"
        by_image[number].append(Question(f"easy-vqa-{split}-{row}", image, question, answer, kind_of(answer)))
    return [ImageQuestions(questions[0].image, tuple(questions)) for _, questions in sorted(by_image.items())]


def held_out_questions(folder: Path, limit: int | None, seed: int = 0) -> list[Question]:
    """Questions of the test split: all of them, or a random `limit` that keeps the kinds' proportions."""
    questions = [q for image in load_split(folder, "test") for q in image.questions]
    random.Random(seed).shuffle(questions)
    return questions[:limit]


def training_rows(folder: Path, data: EasyVqaData, seed: int) -> Iterator[Row]:
    """An endless, reproducible stream of conversations; an epoch passes every training image once."""
    images = load_split(folder, "train")
    rng = random.Random(seed)
    for epoch in itertools.count():
        order = list(images)
        rng.shuffle(order)
        for image in order:
            yield row_of(f"{image.image.stem}-{epoch}", [str(image.image)], _conversation(image, data, rng))


def _conversation(image: ImageQuestions, data: EasyVqaData, rng: random.Random) -> tuple[Message, ...]:
    turns = [(q.question, q.answer) for q in _draw_questions(image.questions, data, rng)]
    if image.caption and rng.random() < data.caption_share:
        turns.insert(0, ("what is in the image?", image.caption))
    messages: list[Message] = []
    for i, (question, answer) in enumerate(turns):
        parts = (ImagePart(), TextPart(question)) if i == 0 else (TextPart(question),)
        messages += [Message("user", parts), Message.text("assistant", answer)]
    return tuple(messages)


def _draw_questions(questions: tuple[Question, ...], data: EasyVqaData, rng: random.Random) -> list[Question]:
    """Draw without replacement; balanced, each draw first picks one of the kinds that are left."""
    left = list(questions)
    rng.shuffle(left)
    if not data.balance_kinds:
        return left[: data.questions_per_image]
    drawn: list[Question] = []
    while left and len(drawn) < data.questions_per_image:
        kind = rng.choice(sorted({q.kind for q in left}))
        pick = next(q for q in left if q.kind == kind)
        left.remove(pick)
        drawn.append(pick)
    return drawn


def _affirmed(question: Question) -> set[str]:
    """Words that are true of the image: the answer, and what a question names if its answer affirms it."""
    words = set(re.findall(r"[a-z]+", question.question))
    negated = bool(words & {"not", "no"})
    denied = question.answer in ("yes", "no") and (question.answer == "yes") == negated
    return {question.answer} if denied else words | {question.answer}
