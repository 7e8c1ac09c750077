"""Ask a bundle held-out questions, batched across Ray workers.

In: a bundle. Out: an answer to each question, and exact-match accuracy by kind of question. Features of the test
images come from the store where they are there.

Run it as `mmllm evaluate` or `ray job submit -- python -m train_jobs.evaluate`.
"""

import json
import math
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


def evaluate(bundle: Bundle, *, limit: int | None = 300, workers: int = 2, seed: int = 0) -> Evaluation:
    """Ask a bundle easy-VQA's test questions.

    Args:
        limit: questions to ask, drawn at random; None asks all 9,673.
        workers: answering processes, one CPU (or GPU, where Ray has some) each.

    Raises:
        TrainingError: a worker failed, for an image that cannot be read for example.
    """
    prepare_ray_data()
    gpus = has_gpus(workers)
    questions = easy_vqa.held_out_questions(easy_vqa.fetch(), limit, seed)
    by_image = sorted(range(len(questions)), key=lambda row: questions[row].image)  # its prompts share a beginning
    rounds = math.ceil(len(questions) / (_QUESTIONS_AT_ONCE * workers))
    dataset = ray.data.from_items([{"row": row} for row in by_image], override_num_blocks=rounds * workers)
    answered = dataset.map_batches(
        _Answerer,
        fn_constructor_args=(str(bundle.folder), features_folder(), limit, seed, gpus),
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

    def __init__(self, bundle: str, features: str, limit: int | None, seed: int, gpu: bool):
        opened = Bundle.open(Path(bundle))
        device = "cuda" if gpu else "cpu"
        self._model = opened.load_model(device)
        self._tokenizer = opened.tokenizer
        self._features = BundleImages(opened, features, device)
        self._questions = easy_vqa.held_out_questions(easy_vqa.fetch(), limit, seed)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        questions = [self._questions[int(row)] for row in batch["row"]]
        answers = answer_questions(self._model, self._tokenizer, questions, self._features)
        return {"row": batch["row"], "answer": np.array(answers, dtype=object)}


if __name__ == "__main__":
    print(evaluate(Bundle.latest()).scores[OVERALL])
