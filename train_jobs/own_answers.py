"""Prompts -> conversations in which an untuned LM answers them itself: text that its tuning can replay.

In: a text file of prompts, one a line, and a profile. Out: JSON Lines in the chat format (`mmllm_core.data.text`). An
LM tuned on images alone soon answers everything as it answers about them. Its own answers, mixed in, hold it where it
was, for they are likely to it already, true or not: self-distillation (arXiv:2402.13669).

Run it as `python -m train_jobs.own_answers PROMPTS OUT [--profile embedded]`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich.progress import track

from mmllm_core.errors import DataError
from mmllm_core.evaluation.accuracy import normalise
from mmllm_core.evaluation.text_ability import text_prompts
from mmllm_core.language import load_language_model, load_tokenizer, stop_token_ids
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from train_jobs.progress import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SENTENCE_END = re.compile("[^\\s\\d][.!?][\"'\u201d\u2019)]*(?=\\s|$)")
"""A digit before the full stop is more often the number of a list's item than the end of a sentence."""
_PENALTY = 1.1
"""As in CTRL (arXiv:1909.05858), but on what the answer itself said; at 1.2 sentences no longer hold together."""


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are neither blank nor begin with `#`.

    Raises:
        DataError: the file cannot be read, or holds no prompts.
    """
    try:
        lines = map(str.strip, path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DataError(f"{path}: holds no prompts: write one a line")
    return prompts


def own_answers(
    lm: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], *, max_new_tokens: int = 120
) -> list[str | None]:
    """Greedy answers in the order of the prompts; None where there is none worth learning from.

    An answer that loops, as most long ones of a small LM do, is given again under a repetition penalty. The others are
    not: they would hold numbers and names that the LM would not have said.
    """
    answers: list[str | None] = [None] * len(prompts)
    for penalty in (1.0, _PENALTY):
        unanswered = [i for i, answer in enumerate(answers) if answer is None]
        given = _greedy_answers(lm, tokenizer, [prompts[i] for i in unanswered], max_new_tokens, penalty)
        for i, answer in zip(unanswered, track(given, "answering", len(unanswered), console=console), strict=True):
            if answer and not loops(answer) and normalise(answer) != normalise(prompts[i]):
                answers[i] = answer
    return answers


@torch.inference_mode()
def _greedy_answers(
    lm: "PreTrainedModel", tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, repetition_penalty: float
) -> Iterator[str]:
    """Answers up to their end, or up to their last whole sentence."""
    stop_ids = stop_token_ids(lm, tokenizer)
    for batch in text_prompts(tokenizer, prompts):
        inputs = batch.to(lm.device)
        new_ids = lm.generate(
            inputs_embeds=lm.get_input_embeddings()(inputs.input_ids),  # of ids it would penalise the prompt's words
            attention_mask=inputs.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=repetition_penalty,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )  # (b, n_new)
        for row in new_ids.tolist():
            text = tokenizer.decode(row, skip_special_tokens=True).strip()
            yield whole_sentences(text) if set(stop_ids).isdisjoint(row) else text


def whole_sentences(text: str) -> str:
    """A text that breaks off, up to the end of its last whole sentence; empty if there is none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def loops(text: str) -> bool:
    """Whether more than a fifth of a text's runs of four words stood in it before."""
    words = text.lower().split()
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(set(runs)) < 0.8 * len(runs)


def main(prompts: Path, out: Path, profile: str = "embedded", max_new_tokens: int = 120) -> None:
    """Have a profile's untuned LM answer the prompts of a text file, one a line."""
    questions = read_prompts(prompts)
    language, device = load_profile(profile).language, "cuda" if torch.cuda.is_available() else "cpu"
    folder = resolve(language.source)
    lm = load_language_model(language, folder, device)
    with out.open("w", encoding="utf-8") as stream:
        answers = own_answers(lm, load_tokenizer(folder), questions, max_new_tokens=max_new_tokens)
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
            if answer is not None:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                stream.write(json.dumps({"id": f"own-{number}", "messages": turns}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
