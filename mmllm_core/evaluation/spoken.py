"""The same questions typed and spoken: what hearing costs, and where it is lost.

In: questions, what Whisper heard of each, and the model's answers to the typed question, to its right transcript and
to what was heard. Out: accuracy of each, word errors, and the wrong answers split by their cause. A spoken question is
the conversation that serving makes of an image and a clip. Does not know sound or Ray.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmllm_core.conversation import ImagePart, Message, SpeechPart, TextPart, render
from mmllm_core.data.sample import Question
from mmllm_core.evaluation.accuracy import Scores, is_right, score_by_kind, scores_to_json
from mmllm_core.evaluation.shared_prefix import Prompt, generate_about_images
from mmllm_core.evaluation.wer import Mishearings, WordErrors, heard_rightly, mishearings, word_error_rate
from mmllm_core.language import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.model import MultimodalLM


@dataclass(frozen=True)
class Hearing:
    """One question: what was heard of it, and the answers."""

    question: Question
    heard: str
    """Whisper's transcript."""
    typed: str
    """Answer to the question as typed text."""
    recognised: str
    """Answer to the question's own text as if Whisper had heard every letter of it: what being speech costs alone."""
    spoken: str
    """Answer to what was heard."""

    @property
    def rightly(self) -> bool:
        """Whether every word was heard."""
        return heard_rightly(self.question.question, self.heard)


@dataclass(frozen=True)
class WrongAnswers:
    """Wrong answers to spoken questions that have one cause."""

    wrong: int
    right_when_typed: int
    """Of them: what being spoken cost. The model answers the others wrongly in any form."""


@dataclass(frozen=True)
class SpokenReport:
    """What came of questions that were asked in each form."""

    hearings: tuple[Hearing, ...]

    @property
    def scores(self) -> dict[str, Scores]:
        """Accuracy by form (`typed`, `recognised`, `spoken`) and kind of question."""
        return {form: _scores(self.hearings, form) for form in ("typed", "recognised", "spoken")}

    @property
    def rightly_heard(self) -> tuple[Hearing, ...]:
        """The questions of which every word was heard."""
        return tuple(hearing for hearing in self.hearings if hearing.rightly)

    @property
    def scores_of_rightly_heard(self) -> Scores:
        """Accuracy of spoken questions of which every word was heard."""
        return _scores(self.rightly_heard, "spoken")

    @property
    def word_errors(self) -> WordErrors:
        """Of Whisper, over all questions."""
        return word_error_rate(*self._said_and_heard())

    @property
    def mishearings(self) -> Mishearings:
        """Which words were taken for which."""
        return mishearings(*self._said_and_heard())

    @property
    def heard_wrongly_and_wrong(self) -> WrongAnswers:
        """Answered wrongly after a word was heard wrongly: the loss by recognition."""
        return _wrong_answers([hearing for hearing in self.hearings if not hearing.rightly])

    @property
    def heard_rightly_and_wrong(self) -> WrongAnswers:
        """Answered wrongly though every word was heard: by the model, or by how Whisper writes (case, punctuation)."""
        return _wrong_answers(self.rightly_heard)

    def to_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        errors = self.word_errors
        return {
            "accuracy": {form: scores_to_json(scores) for form, scores in self.scores.items()},
            "accuracy_of_rightly_heard": scores_to_json(self.scores_of_rightly_heard),
            "word_errors": vars(errors) | {"rate": errors.rate},
            "wrong_answers": {
                "heard_wrongly": vars(self.heard_wrongly_and_wrong),
                "heard_rightly": vars(self.heard_rightly_and_wrong),
            },
            "mishearings": [
                {"said": said, "heard": heard, "times": times}
                for (said, heard), times in self.mishearings.most_common()
            ],
            "questions": [
                {
                    "id": h.question.id,
                    "image": str(h.question.image),
                    "kind": h.question.kind,
                    "question": h.question.question,
                    "heard": h.heard,
                    "right": h.question.answer,
                    "typed": h.typed,
                    "recognised": h.recognised,
                    "spoken": h.spoken,
                }
                for h in self.hearings
            ],
        }

    def _said_and_heard(self) -> tuple[list[str], list[str]]:
        return [h.question.question for h in self.hearings], [h.heard for h in self.hearings]


def typed_message(question: str) -> Message:
    """An image and a typed question."""
    return Message("user", (ImagePart(), TextPart(question)))


def spoken_message(transcript: str) -> Message:
    """An image and a question that was heard, as serving puts a clip's transcript into the conversation."""
    return Message("user", (ImagePart(), SpeechPart(transcript)))


def answer_hearings(
    model: "MultimodalLM",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    heard: Sequence[str],
    features_of: Callable[[Path], NDArray[np.float16]],
) -> Iterator[Hearing]:
    """Answer each question in its three forms, greedily.

    Args:
        heard: the transcript of each question.
        features_of: features of an image file, float16 (n_patches, d_vision).
    """
    asked = [
        (question.image, message)
        for question, transcript in zip(questions, heard, strict=True)
        for message in (
            typed_message(question.question),
            spoken_message(question.question),
            spoken_message(transcript),
        )
    ]
    answers = iter(_answer(model, tokenizer, asked, features_of))
    for question, transcript in zip(questions, heard, strict=True):
        yield Hearing(question, transcript, next(answers), next(answers), next(answers))


def _answer(
    model: "MultimodalLM",
    tokenizer: "PreTrainedTokenizerBase",
    asked: Sequence[tuple[Path, Message]],
    features_of: Callable[[Path], NDArray[np.float16]],
    *,
    max_new_tokens: int = 8,
) -> list[str]:
    """Answer messages, each with its image; those that are rendered alike about one image are answered once.

    Speech is rendered like typed text as long as `mmllm_core.conversation` says so. Should it be marked one day, forms
    will differ here by themselves.
    """
    images = {path: number for number, path in enumerate(dict.fromkeys(image for image, _ in asked))}
    features = [features_of(path) for path in images]
    keys = []
    for image, message in asked:
        rendered = render(
            [message],
            tokenizer,
            n_image_tokens=model.connector.n_tokens(len(features[images[image]])),
            max_length=4096,
            generation_prompt=True,
        )
        keys.append((images[image], tuple(rendered.input_ids)))
    different = list(dict.fromkeys(keys))
    new_ids = generate_about_images(
        model,
        [Prompt(ids, image) for image, ids in different],
        features,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_token_ids(model.causal_lm, tokenizer),
    )
    answers = dict(zip(different, tokenizer.batch_decode(new_ids, skip_special_tokens=True), strict=True))
    return [str(answers[key]) for key in keys]


def _scores(hearings: Sequence[Hearing], form: str) -> Scores:
    return score_by_kind([h.question for h in hearings], [getattr(h, form) for h in hearings])


def _wrong_answers(hearings: Sequence[Hearing]) -> WrongAnswers:
    wrong = [h for h in hearings if not is_right(h.question, h.spoken)]
    return WrongAnswers(len(wrong), sum(is_right(h.question, h.typed) for h in wrong))
