"""Chat messages -> token spans -> labels: the one renderer of training and serving.

In: messages of text, image and speech parts, and any tokenizer with a chat template.
Out: token ids in which every image is a run of `IMAGE_TOKEN_ID`, and labels that supervise what the
assistant says and its end-of-turn token. Does not know features, connectors or models.

The chat template is rendered once with a marker in place of each message's content. What lies between
markers is scaffold, tokenized with its control tokens; contents are cut inside whatever spells a control
token, so that text typed by a user never becomes one. Labels follow the spans: nothing is
tokenized twice and nothing is searched for.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from mmllm_core.errors import ConversationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN_ID = -200
"""Stands where a feature will be spliced in; never a row of the embedding matrix (as in LLaVA)."""
IGNORE_INDEX = -100
"""Label of a position that is not supervised (as in torch's cross-entropy)."""

_MARKER = re.compile("\ue000(\\d+)\ue001")
_MARKUP = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
"""How control tokens look that a tokenizer does not mark as special; runs of spaces do not look so."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class TextPart:
    """Text that was typed."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image; the i-th image part of a conversation belongs to the i-th feature."""


@dataclass(frozen=True)
class SpeechPart:
    """Text that was heard. Rendered like typed text, so that a spoken question meets what was trained."""

    transcript: str


Part = TextPart | ImagePart | SpeechPart


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    parts: tuple[Part, ...]

    @classmethod
    def text(cls, role: Role, text: str) -> "Message":
        """A turn of text alone."""
        return cls(role, (TextPart(text),))


@dataclass(frozen=True)
class Rendered:
    """Token ids and labels of one conversation, both of length t; images are runs of `IMAGE_TOKEN_ID`."""

    input_ids: list[int]
    labels: list[int]
    n_images: int

    @property
    def n_supervised(self) -> int:
        """How many positions carry a label."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def render(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    n_image_tokens: int,
    max_length: int,
    generation_prompt: bool,
) -> Rendered:
    """Render a conversation for the LM.

    Args:
        n_image_tokens: LM positions an image takes, i.e. the rows that the connector returns for it.
        max_length: longest sequence allowed, images included.
        generation_prompt: True to end where the assistant begins to speak (serving), False to end after
            its last turn (training).

    Raises:
        ConversationError: no messages, a turn out of order, a template that drops a turn, a conversation longer
            than `max_length`, or, for training, one in which nothing is supervised.
    """
    _check_turns(messages)
    control = _control_of(tokenizer)
    spans: list[_Span] = []
    scaffolds, order = _scaffold(messages, tokenizer, generation_prompt)
    answered = False
    for i, scaffold in enumerate(scaffolds):
        spans.append(_Span(scaffold, "end of turn" if answered else "no"))
        if i < len(order):
            message = messages[order[i]]
            answered = message.role == "assistant"
            spans += _content_spans(message, control.spelled, "yes" if answered else "no")

    input_ids: list[int] = []
    labels: list[int] = []
    for span, ids in zip(spans, _tokenize(spans, tokenizer, n_image_tokens), strict=True):
        n_supervised = len(ids) if span.supervised == "yes" else 0
        if span.supervised == "end of turn":
            n_supervised = control.end_of_turn_length(ids)
        input_ids += ids
        labels += ids[:n_supervised] + [IGNORE_INDEX] * (len(ids) - n_supervised)

    if not generation_prompt and labels.count(IGNORE_INDEX) == len(labels):
        raise ConversationError("nothing is supervised: the assistant says nothing in this conversation", "messages")
    if len(input_ids) > max_length:
        raise ConversationError(
            f"the conversation takes {len(input_ids)} tokens, images included, and at most {max_length} fit: "
            "shorten it or send fewer images",
            "messages",
        )
    return Rendered(input_ids, labels, sum(span.text is None for span in spans))


@dataclass(frozen=True)
class _Span:
    """Text that is tokenized by itself, or an image."""

    text: str | None
    supervised: Literal["no", "yes", "end of turn"]


@dataclass(frozen=True)
class _Control:
    """What a tokenizer has for control tokens."""

    n_tokens: int
    """Of the tokenizer when this was read."""
    spelled: re.Pattern[str] | None
    """Matches, without consuming, where text spells one."""
    special_ids: frozenset[int]

    def end_of_turn_length(self, ids: Sequence[int]) -> int:
        """Tokens of a scaffold up to and including its first special token, which ends the assistant's turn."""
        return next((i + 1 for i, token in enumerate(ids) if token in self.special_ids), 0)


_controls: "WeakKeyDictionary[PreTrainedTokenizerBase, _Control]" = WeakKeyDictionary()


def _control_of(tokenizer: "PreTrainedTokenizerBase") -> _Control:
    """Read once for each tokenizer: rendering is on the path of every request and every training sample."""
    known = _controls.get(tokenizer)
    if known is None or known.n_tokens != len(tokenizer):
        added = tokenizer.added_tokens_decoder
        contents = [re.escape(t.content) for t in added.values() if t.special or _MARKUP.fullmatch(t.content)]
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        spelled = re.compile(f"(?={'|'.join(contents)})") if contents else None
        known = _controls[tokenizer] = _Control(len(tokenizer), spelled, frozenset(special))
    return known


def text_runs(message: Message) -> list[str]:
    """The texts before, between and after a turn's images: one more than images, each perhaps empty.

    Parts stand on lines of their own, as `<image>\\nquestion` in LLaVA.
    """
    runs = [""]
    for i, part in enumerate(p for p in message.parts if isinstance(p, ImagePart) or _part_text(p)):
        if i > 0:
            runs[-1] += "\n"
        if isinstance(part, ImagePart):
            runs.append("")
        else:
            runs[-1] += _part_text(part)
    return runs


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Finds where a text spells one of the tokenizer's control tokens; None if there are none."""
    return _control_of(tokenizer).spelled


def text_pieces(text: str, control: re.Pattern[str] | None) -> list[str]:
    """Cut typed text after the first character of each control token that it spells; the pieces are tokenized apart.

    transformers' `split_special_tokens` would leave tokens such as Phi-4's `<|tool|>` whole, which are not marked as
    special, and it is a switch on the tokenizer itself: threads that render at once would flip it for each other.
    """
    if not text:
        return []
    cuts = [match.start() + 1 for match in control.finditer(text)] if control else []
    return [text[at:end] for at, end in itertools.pairwise([0, *cuts, len(text)])]


def _check_turns(messages: Sequence[Message]) -> None:
    if not messages:
        raise ConversationError("the conversation has no messages", "messages")
    for i, message in enumerate(messages):
        if message.role == "system" and i > 0:
            raise ConversationError("a system message must come first", f"messages.{i}.role")
        if message.role == "assistant" and any(isinstance(part, ImagePart) for part in message.parts):
            raise ConversationError("an assistant message cannot hold an image", f"messages.{i}.content")
        if not any(isinstance(part, ImagePart) or _part_text(part) for part in message.parts):
            raise ConversationError(f"message {i} is empty", f"messages.{i}.content")


def _scaffold(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", generation_prompt: bool
) -> tuple[list[str], list[int]]:
    """Text around the contents (n + 1 pieces) and the order in which the template places the n contents."""
    marked = [{"role": m.role, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # jinja raises what the template's author chose
        raise ConversationError(f"the chat template refuses this conversation: {error}", "messages") from error
    pieces = _MARKER.split(str(text))
    order = [int(index) for index in pieces[1::2]]
    if order != list(range(len(messages))):
        raise ConversationError("the chat template does not place every message once and in order", "messages")
    return pieces[0::2], order


def _content_spans(
    message: Message, control: re.Pattern[str] | None, supervised: Literal["no", "yes"]
) -> Iterator[_Span]:
    for i, run in enumerate(text_runs(message)):
        if i > 0:
            yield _Span(None, "no")
        yield from (_Span(piece, supervised) for piece in text_pieces(run, control))


def _part_text(part: TextPart | SpeechPart | ImagePart) -> str:
    if isinstance(part, TextPart):
        return part.text.strip()
    return part.transcript.strip() if isinstance(part, SpeechPart) else ""


def _tokenize(spans: Sequence[_Span], tokenizer: "PreTrainedTokenizerBase", n_image_tokens: int) -> Iterator[list[int]]:
    """Ids of each span; the texts go through the tokenizer in one call."""
    texts = [span.text for span in spans if span.text is not None]
    ids = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids)
    return (list(next(ids)) if span.text is not None else [IMAGE_TOKEN_ID] * n_image_tokens for span in spans)
