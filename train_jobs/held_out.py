"""Held-out questions of a run: asked before and after training, each worker its share.

In: a model and where images' features come from. Out, on every worker: answers to all questions, in their order; and a
file of both. Scores follow from the answers. Does not know how the model is trained.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from mmllm_core.data import easy_vqa
from mmllm_core.data.feature_shards import Features
from mmllm_core.data.sample import Question
from train_jobs.run_record import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.model import MultimodalLM


class HeldOutQuestions:
    """easy-VQA's test questions, as many as a recipe asks; without any nothing is asked.

    Args:
        limit: how many, drawn at random by `seed`.
    """

    def __init__(self, limit: int, seed: int):
        self.questions = easy_vqa.held_out_questions(easy_vqa.fetch(), limit, seed) if limit else []

    def share(self, rank: int, world: int) -> list[int]:
        """Numbers of the questions that worker `rank` of `world` asks, in the order in which it asks them."""
        # What asks about one image stays together: its prompts share a beginning.
        order = sorted(range(len(self.questions)), key=lambda i: self.questions[i].image)
        return order[rank * len(order) // world : (rank + 1) * len(order) // world]

    def ask(
        self,
        model: "MultimodalLM",
        tokenizer: "PreTrainedTokenizerBase",
        features: Callable[[Path], Features],
    ) -> list[str]:
        """Answers to all questions; all workers of the process group take part."""
        import torch.distributed as dist

        from mmllm_core.evaluation.accuracy import answer_questions

        if not self.questions:
            return []
        share = self.share(dist.get_rank(), dist.get_world_size())
        model.eval()
        found = answer_questions(model, tokenizer, [self.questions[i] for i in share], features)
        model.train()
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, list(zip(share, found, strict=True)))
        answers = dict(pair for part in shares for pair in part)
        return [answers[i] for i in range(len(self.questions))]


def write_answers(path: Path, questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> None:
    """Write questions with both answers, as `train_jobs.run_record.read_run` reads them."""
    rows = [
        Answer(image=asked.image, question=asked.question, right=asked.answer, kind=asked.kind, before=was, after=now)
        for asked, was, now in zip(questions, before, after, strict=True)
    ]
    scratch = path.with_suffix(".part")
    scratch.write_bytes(TypeAdapter(list[Answer]).dump_json(rows))
    scratch.replace(path)
