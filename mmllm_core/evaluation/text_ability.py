"""What tuning did to an LM's plain text: everyday questions answered, and the loss on prose.

In: a `MultimodalLM`, asked without images, or a bundle. Out: questions answered rightly and the loss per token of
held-out prose. Both sets are fixed and lie beside this file (`text_ability.yaml`): 50 questions of general knowledge,
arithmetic and language with the answers that count, of which the untuned SmolLM2-135M-Instruct (NF4) answers 27, and 30
paragraphs, 3,493 of its tokens, written for this purpose.

A reply counts if one of the accepted answers stands in its first 32 tokens, whatever else it says. So 50 questions tell
whether much was forgotten; the loss on prose moves first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from mmllm_core.bundle import Bundle
from mmllm_core.config import PathSource, StrictModel, load_config
from mmllm_core.conversation import IGNORE_INDEX, Message, Rendered, render
from mmllm_core.data.collate import Batch, collate
from mmllm_core.errors import BundleError
from mmllm_core.evaluation.accuracy import Score, normalise
from mmllm_core.language import load_language_model, stop_token_ids
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.model import MultimodalLM

MAX_NEW_TOKENS = 32
"""An answer must come within these; the LM may go on talking after it."""

_LONGEST = 1024
"""Tokens that a paragraph or a question may take; none comes near it with any tokenizer in use."""


class TextQuestion(StrictModel):
    """A question and the answers that count, each as words that must appear in the reply."""

    question: str
    answers: tuple[str, ...] = Field(min_length=1)


class TextSet(StrictModel):
    """What `text_ability.yaml` holds."""

    questions: tuple[TextQuestion, ...]
    prose: tuple[str, ...]


@dataclass(frozen=True)
class TextAbility:
    """What an LM does with plain text."""

    right: int
    """Questions answered rightly."""
    asked: int
    loss_per_token: float
    """Mean cross-entropy in nats over all tokens of the prose but each paragraph's first."""

    @property
    def score(self) -> Score:
        """The questions, with a confidence interval."""
        return Score(self.right, self.asked)

    def loss_change(self, untuned: "TextAbility") -> float:
        """By which share the loss has grown over that of the untuned LM: 0.02 for 2% more, negative for less."""
        return self.loss_per_token / untuned.loss_per_token - 1


def measure(model: "MultimodalLM", tokenizer: "PreTrainedTokenizerBase") -> TextAbility:
    """Measure an LM through the path that answers about images take, but without images.

    Decoding is greedy, so equal weights measure equal. The mode of the model is left as it was found.
    """
    training = model.training
    model.eval()
    try:
        questions = text_set().questions
        replies = text_replies(model, tokenizer, [q.question for q in questions])
        right = sum(accepts(question, reply) for question, reply in zip(questions, replies, strict=True))
        return TextAbility(right, len(questions), loss_per_token(model, tokenizer, text_set().prose))
    finally:
        model.train(training)


def compare(bundle: Bundle, device: str = "cpu") -> tuple[TextAbility, TextAbility]:
    """Measure a bundle's LM as it was tuned, and as it was before.

    Before is the LM without the adapter; for a bundle that carries a whole tuned or merged LM, the LM of the profile
    that its recipe names.

    Returns:
        Tuned and untuned.

    Raises:
        BundleError: the bundle carries an LM and was not trained here, so that nobody knows from what it was tuned.
    """
    source = bundle.profile.language.source
    carries_lm = isinstance(source, PathSource) and not source.path.is_absolute()
    if carries_lm and "profile" not in bundle.info.recipe:
        raise BundleError(f"{bundle.folder}: carries an LM of its own, and no recipe says which LM it was before")
    model = bundle.load_model(device)
    tuned = measure(model, bundle.tokenizer)
    if carries_lm:
        language = load_profile(bundle.info.recipe["profile"]).language
        model.lm = load_language_model(language, resolve(language.source), device)
    elif model.adapter is None:  # the connector alone was trained, and text does not pass through it
        return tuned, tuned
    with adapter_disabled(model):
        return tuned, measure(model, bundle.tokenizer)


@contextmanager
def adapter_disabled(model: "MultimodalLM") -> Iterator[None]:
    """Let the LM be what it was before tuning within the block; without an adapter it already is."""
    adapter: Any = model.adapter
    if adapter is None:
        yield
        return
    trainable = {name: parameter.requires_grad for name, parameter in adapter.named_parameters()}
    with adapter.disable_adapter():
        yield
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(trainable[name])  # peft unfreezes what it enables again


def text_replies(
    model: "MultimodalLM", tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str], *, batch_size: int = 16
) -> Iterator[str]:
    """Greedy replies of at most `MAX_NEW_TOKENS`, each in a conversation of its own."""
    stop_ids = stop_token_ids(model.causal_lm, tokenizer)
    for prompts in text_prompts(tokenizer, questions, batch_size=batch_size):
        inputs = prompts.to(model.causal_lm.device)
        new_ids = model.generate(
            inputs.input_ids, inputs.attention_mask, None, max_new_tokens=MAX_NEW_TOKENS, stop_ids=stop_ids
        )  # (b, n_new)
        yield from tokenizer.batch_decode(new_ids, skip_special_tokens=True)


def text_prompts(
    tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str], *, batch_size: int = 16
) -> Iterator[Batch]:
    """Questions as an LM is asked them, each in a conversation of its own: batches in order, padded on the left.

    Raises:
        ConversationError: a question is empty or longer than 1,024 tokens.
    """
    for start in range(0, len(questions), batch_size):
        rendered = [
            render(
                [Message.text("user", question)],
                tokenizer,
                n_image_tokens=0,
                max_length=_LONGEST,
                generation_prompt=True,
            )
            for question in questions[start : start + batch_size]
        ]
        yield collate(rendered, [], padding="left")


@torch.inference_mode()
def loss_per_token(
    model: "MultimodalLM", tokenizer: "PreTrainedTokenizerBase", paragraphs: Sequence[str], *, batch_size: int = 5
) -> float:
    """Mean cross-entropy in nats, by teacher forcing, over all tokens but each paragraph's first.

    Args:
        paragraphs: plain text; no chat template is put around it.
    """
    ids = tokenizer(list(paragraphs), add_special_tokens=False, truncation=True, max_length=_LONGEST).input_ids
    ids.sort(key=len)  # like lengths share a batch, and little is spent on padding
    total, n_tokens = 0.0, 0
    for start in range(0, len(ids), batch_size):
        rows = [Rendered(row, [IGNORE_INDEX, *row[1:]], 0) for row in ids[start : start + batch_size]]
        batch = collate(rows, []).to(model.causal_lm.device)
        total += float(model(batch.input_ids, batch.attention_mask, batch.labels, None))
        n_tokens += batch.n_supervised
    return total / n_tokens


def accepts(question: TextQuestion, reply: str) -> bool:
    """Whether one of the answers stands in the reply, as whole words and whatever the case or punctuation."""
    words = f" {normalise(reply)} "
    return any(f" {normalise(answer)} " in words for answer in question.answers)


@cache
def text_set() -> TextSet:
    """The questions and the prose."""
    return load_config(TextSet, Path(__file__).with_name("text_ability.yaml"))
