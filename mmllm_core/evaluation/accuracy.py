"""Exact-match accuracy by kind of question, beside the baseline that always gives a kind's commonest answer."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmllm_core.conversation import ImagePart, Message, TextPart, render
from mmllm_core.data.sample import Question
from mmllm_core.language import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.model import MultimodalLM

OVERALL = "all"

_Z = NormalDist().inv_cdf(0.975)
"""Standard deviations on either side of a mean that hold 95% of a normal distribution: 1.96."""


@dataclass(frozen=True)
class Score:
    """Right answers out of questions asked."""

    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """Share that was right, 0 to 1; 0 when nothing was asked."""
        return self.right / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the accuracy, 0 to 1: where it would lie if endlessly many were asked.

        Wilson's score interval (1927, JASA 22:209), which stays within 0 and 1 and has a width also where all or none
        were right. Questions count as independent. When nothing was asked, all is possible.
        """
        if not self.asked:
            return 0.0, 1.0
        n, share = self.asked, self.accuracy
        centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half_width = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
        # Rounding must not put the accuracy itself outside.
        return min(share, max(0.0, centre - half_width)), max(share, min(1.0, centre + half_width))

    def __str__(self) -> str:
        """`97.4% (97.1-97.7)`: accuracy and its 95% interval."""
        low, high = self.interval
        return f"{self.accuracy:.1%} ({100 * low:.1f}-{100 * high:.1f})"


Scores = dict[str, Score]
"""By kind of question, and overall under `OVERALL`."""


def answer_questions(
    model: "MultimodalLM",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    features_of: Callable[[Path], NDArray[np.float16]],
    *,
    max_new_tokens: int = 8,
    max_positions: int = 4096,
) -> list[str]:
    """Answer each question about its image, greedily and each in a conversation of its own.

    Args:
        model: in eval mode.
        features_of: features of an image file, float16 (n_patches, d_vision); asked once for each image.
        max_positions: bounds the size of batches, as in `generate_about_images`.
    """
    from mmllm_core.evaluation.shared_prefix import Prompt, generate_about_images

    images = {path: number for number, path in enumerate(dict.fromkeys(q.image for q in questions))}
    features = [features_of(path) for path in images]
    prompts = []
    for question in questions:
        rendered = render(
            [Message("user", (ImagePart(), TextPart(question.question)))],
            tokenizer,
            n_image_tokens=model.connector.n_tokens(len(features[images[question.image]])),
            max_length=4096,
            generation_prompt=True,
        )
        prompts.append(Prompt(rendered.input_ids, images[question.image]))
    new_ids = generate_about_images(
        model,
        prompts,
        features,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_token_ids(model.causal_lm, tokenizer),
        max_positions=max_positions,
    )
    return [str(answer) for answer in tokenizer.batch_decode(new_ids, skip_special_tokens=True)]


def normalise(answer: str) -> str:
    """Lower case, without punctuation or surplus space."""
    return " ".join(re.sub(r"[^\w\s]", " ", answer.lower()).split())


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is the right one, whatever its case and punctuation."""
    return normalise(answer) == normalise(question.answer)


def score_by_kind(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Score per kind of question, and overall under `OVERALL`, which comes first."""
    asked = Counter(question.kind for question in questions)
    right = Counter(q.kind for q, a in zip(questions, answers, strict=True) if is_right(q, a))
    overall = Score(right.total(), asked.total())
    return {OVERALL: overall} | {kind: Score(right[kind], asked[kind]) for kind in sorted(asked)}


def commonest_answer_baseline(questions: Sequence[Question]) -> Scores:
    """The score of always giving a kind's commonest answer among these questions."""
    commonest = {
        kind: Counter(q.answer for q in questions if q.kind == kind).most_common(1)[0][0]
        for kind in {q.kind for q in questions}
    }
    return score_by_kind(questions, [commonest[q.kind] for q in questions])


def scores_to_json(scores: Scores) -> dict[str, list[int]]:
    """`{kind: [right, asked]}`, as bundles and logs record it."""
    return {kind: [score.right, score.asked] for kind, score in scores.items()}


def scores_from_json(values: dict[str, list[int]]) -> Scores:
    """Inverse of `scores_to_json`."""
    return {kind: Score(right, asked) for kind, (right, asked) in values.items()}
