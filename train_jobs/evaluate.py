"""Put questions to a bundle, batched across Ray workers: held-out ones of easy-VQA, or a file's.

In: a bundle. Out: an answer to each question, and exact-match accuracy by kind of question. Features of
their images come from the store where they are there.

Run it as `mmllm evaluate` or `ray job submit -- python -m train_jobs.evaluate`.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from mmllm_core.bundle import Bundle
from mmllm_core.data import easy_vqa
from mmllm_core.data.sample import Question
from mmllm_core.evaluation.accuracy import (
    OVERALL,
    Scores,
    answer_questions,
    commonest_answer_baseline,
    is_right,
    score_by_kind,
)
from mmllm_core.evaluation.file_questions import file_questions
from mmllm_core.models.home import features_folder
from train_jobs.bundle_images import BundleImages
from train_jobs.launch import has_gpus, prepare_ray_data, readable_errors
from train_jobs.progress import progress_bar

_QUESTIONS_AT_ONCE = 512
"""Given to a worker at a time: so many that batches of prompts fill, so few that the bar moves."""


@dataclass(frozen=True)
class Evaluation:
    """Questions and what the bundle answered."""

    questions: Sequence[Question]
    answers: Sequence[str]
    """In the order of `questions`."""

    @property
    def scores(self) -> Scores:
        """Of the bundle."""
        return score_by_kind(self.questions, self.answers)

    @property
    def baseline(self) -> Scores:
        """Of always giving a kind's commonest answer."""
        return commonest_answer_baseline(self.questions)

    def save(self, path: Path) -> None:
        """Write JSON lines, one a question: `id`, `image`, `kind`, `question`, `right`, `answer` and `is_right`."""
        with path.open("w", encoding="utf-8") as stream:
            for asked, answer in zip(self.questions, self.answers, strict=True):
                line = {
                    "id": asked.id,
                    "image": str(asked.image),
                    "kind": asked.kind,
                    "question": asked.question,
                    "right": asked.answer,
                    "answer": answer,
                    "is_right": is_right(asked, answer),
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Asked:
    """Which questions are put to a bundle: easy-VQA's test questions, or those of a file."""

    limit: int | None = 300
    """So many, drawn at random; None asks all (of easy-VQA 9,673)."""
    seed: int = 0
    file: Path | None = None
    """In LLaVA's format (`mmllm_core.evaluation.file_questions`), where every worker can read it."""
    images: Path | None = None
    """Folder that the file's image names start from; the file's own if None."""

    def questions(self) -> list[Question]:
        """The questions, the same ones on every machine.

        Raises:
            DataError: the file cannot be read as questions.
        """
        if self.file is None:
            return easy_vqa.held_out_questions(easy_vqa.fetch(), self.limit, self.seed)
        questions = file_questions(self.file, self.images)
        random.Random(self.seed).shuffle(questions)
        return questions[: self.limit]


def evaluate(bundle: Bundle, asked: Asked = Asked(), *, workers: int = 2) -> Evaluation:
    """Put questions to a bundle.

    Args:
        workers: answering processes, one CPU (or GPU, where Ray has some) each.

    Raises:
        DataError: as `Asked.questions`.
        TrainingError: a worker failed, for an image that cannot be read for example.
    """
    questions = asked.questions()
    prepare_ray_data()
    gpus = has_gpus(workers)
    by_image = sorted(range(len(questions)), key=lambda row: questions[row].image)  # its prompts share a beginning
    rounds = math.ceil(len(questions) / (_QUESTIONS_AT_ONCE * workers))
    dataset = ray.data.from_items([{"row": row} for row in by_image], override_num_blocks=rounds * workers)
    answered = dataset.map_batches(
        _Answerer,
        fn_constructor_args=(str(bundle.folder), features_folder(), asked, gpus),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=0 if gpus else 1,
        num_gpus=1 if gpus else 0,
    )
    answers = [""] * len(questions)
    with readable_errors("evaluation"), progress_bar() as progress:
        task = progress.add_task("asking", total=len(questions), note="loading")
        for block in answered.iter_batches(batch_size=None):
            for row, answer in zip(block["row"], block["answer"], strict=True):
                answers[int(row)] = str(answer)
            progress.update(task, advance=len(block["row"]), note="")
    return Evaluation(questions, answers)


class _Answerer:
    """One worker of the pool."""

    def __init__(self, bundle: str, features: str, asked: Asked, gpu: bool):
        opened = Bundle.open(Path(bundle))
        device = "cuda" if gpu else "cpu"
        self._model = opened.load_model(device)
        self._tokenizer = opened.tokenizer
        self._features = BundleImages(opened, features, device)
        self._questions = asked.questions()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        questions = [self._questions[int(row)] for row in batch["row"]]
        answers = answer_questions(self._model, self._tokenizer, questions, self._features)
        return {"row": batch["row"], "answer": np.array(answers, dtype=object)}


if __name__ == "__main__":
    print(evaluate(Bundle.latest()).scores[OVERALL])
