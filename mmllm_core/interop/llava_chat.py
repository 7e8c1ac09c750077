"""The tokenizer of a LLaVA checkpoint, with a chat template that `mmllm_core.conversation` can render.

In: a checkpoint folder. Out: a tokenizer whose template takes contents as strings. Does not know images: the
renderer places them by itself, so the checkpoint's own `<image>` token stays unused.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm_core.conversation import Message, render
from mmllm_core.errors import ConversationError, WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PHI3_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Phi-3's format, for Phi-3 tokenizers that carry no usable template."""

_STRINGS_TO_LISTS = (
    "{%- set ns = namespace(listed=[]) -%}{%- for m in messages -%}"
    "{%- set ns.listed = ns.listed + [{'role': m.role, 'content': [{'type': 'text', 'text': m.content}]}] -%}"
    "{%- endfor -%}{%- set messages = ns.listed %}"
)
"""Goes before a template that expects contents as lists of parts, as the templates of processors do."""

_FOLD_SYSTEM = (
    "{%- if messages | length > 1 and messages[0].role == 'system' and messages[1].role == 'user' -%}"
    "{%- set said = messages[0].content + '\\n' + messages[1].content -%}"
    "{%- set messages = [{'role': 'user', 'content': said}] + messages[2:] -%}{%- endif %}"
)
"""Goes before a template that has no place for a system message, as Phi-3's first: it opens the user's turn."""

_PROBE = (Message.text("user", "a"), Message.text("assistant", "b"), Message.text("user", "c"))
_SYSTEM = Message.text("system", "s")


def load_chat_tokenizer(folder: Path, chat_template: str | None = None) -> "PreTrainedTokenizerBase":
    """Load a checkpoint's tokenizer and settle its chat template.

    The template is, of these, the first that renders a conversation: the one given, else the tokenizer's, the
    processor's, or Phi-3's for a tokenizer with Phi-3's control tokens. Where it has no place for a system message,
    that message opens the user's turn.

    Args:
        chat_template: Jinja template to use instead of the checkpoint's.

    Raises:
        WeightsError: the folder holds no tokenizer, or no template can be used.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}: holds no tokenizer that can be loaded: {error}") from error
    candidates = [chat_template] if chat_template else list(_templates(folder, tokenizer))
    for template in candidates:
        for variant in (template, _STRINGS_TO_LISTS + template):
            tokenizer.chat_template = variant
            if _renders(tokenizer, _PROBE):
                _make_room_for_system(tokenizer)
                _lead_with_bos(tokenizer)
                return tokenizer
    problem = "the chat template cannot be used" if candidates else "the checkpoint has no chat template"
    raise WeightsError(f"{folder}: {problem}: give one as chat_template, with contents as strings")


def _templates(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    if isinstance(tokenizer.chat_template, str):
        yield tokenizer.chat_template
    for name in ("chat_template.json", "processor_config.json"):  # a processor's, which the tokenizer does not read
        if (folder / name).is_file():
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(template, str):
                yield template
    if {"<|user|>", "<|assistant|>", "<|end|>"} <= tokenizer.get_vocab().keys():
        yield PHI3_CHAT_TEMPLATE


def _renders(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> bool:
    try:
        render(messages, tokenizer, n_image_tokens=1, max_length=10_000, generation_prompt=True)
    except ConversationError:
        return False
    return True


def _make_room_for_system(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Fold a system message into the first turn where the template drops or refuses it."""
    template = tokenizer.chat_template
    if not _renders(tokenizer, (_SYSTEM, *_PROBE)):
        tokenizer.chat_template = _FOLD_SYSTEM + template
        if not _renders(tokenizer, (_SYSTEM, *_PROBE)):
            tokenizer.chat_template = template


def _lead_with_bos(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make the template open with BOS where the tokenizer itself adds it.

    A LLaVA processor renders text and lets the tokenizer add BOS; our renderer adds no token that the template
    does not name.
    """
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    if adds_bos and not text.startswith(tokenizer.bos_token):
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
