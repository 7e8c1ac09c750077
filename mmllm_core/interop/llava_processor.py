"""The processor of an exported LLaVA checkpoint: it turns a conversation into the ids that our renderer gives.

In: a tokenizer with a chat template that takes contents as strings. Out: a `LlavaProcessor` whose template takes
contents as strings or as lists of parts, as `AutoProcessor.apply_chat_template` is called. Does not know weights.

Our renderer tokenizes what the template writes and what people say apart, and a processor tokenizes the whole text.
Both give the same ids where the template puts control tokens or line breaks around contents, as ChatML, Phi and
Llama 3 do. Text that spells a control token stays text in ours alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmllm_core.conversation import IMAGE_TOKEN_ID, ImagePart, Message, Role, TextPart, render
from mmllm_core.errors import ConversationError, ExportError

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerBase

    from mmllm_core.interop.clip_weights import HuggingFaceTower

IMAGE_TOKEN = "<image>"

_PARTS_TO_STRINGS = (
    "{%- set ns = namespace(flat=[], lines=[]) -%}{%- for m in messages -%}"
    "{%- set ns.lines = [m.content | trim] if m.content is string else [] -%}"
    "{%- if m.content is not string -%}{%- for part in m.content -%}"
    "{%- set line = '" + IMAGE_TOKEN + "' if part.type == 'image' else part.text | trim -%}"
    "{%- if line -%}{%- set ns.lines = ns.lines + [line] -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- set ns.flat = ns.flat + [{'role': m.role, 'content': ns.lines | join('\\n')}] -%}{%- endfor -%}"
    "{%- set messages = ns.flat %}"
)
"""Goes before a template that takes contents as strings: parts stand on lines of their own, as our renderer has it."""


def build_processor(
    tokenizer: "PreTrainedTokenizerBase", tower: "HuggingFaceTower", *, cls_token: bool, exact_ids: bool = True
) -> "LlavaProcessor":
    """Build the processor of a checkpoint.

    Args:
        tokenizer: the LM's; gets the token `<image>` if it has none, so it must not be shared.
        tower: gives the image processor's settings and the number of patches.
        cls_token: whether the CLS token leads the features ("full" in LLaVA).
        exact_ids: whether to refuse a template that a processor tokenizes otherwise than our renderer.

    Raises:
        ExportError: ids would differ from those that the model was trained on.
    """
    from tokenizers import AddedToken
    from transformers import CLIPImageProcessor, LlavaProcessor

    bare = tokenizer.chat_template
    if not isinstance(bare, str):
        raise ExportError("the tokenizer has several chat templates: keep the one that the model was trained with")
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])  # none if it is there already
    processor = LlavaProcessor(
        CLIPImageProcessor(**tower.processor),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="full" if cls_token else "default",
        num_additional_image_tokens=1,  # the tower's CLS token, which "default" takes away again
        image_token=IMAGE_TOKEN,
        chat_template=_PARTS_TO_STRINGS + bare,
    )
    if exact_ids:
        _require_equal_ids(processor, tokenizer)
    tokenizer.chat_template = processor.chat_template  # both are saved to one file
    return processor


def processor_ids(processor: Any, messages: Sequence[Message], n_image_tokens: int) -> list[int]:
    """Ids that a processor gives a conversation that the assistant is to answer; images as runs of `<image>`."""
    text = processor.apply_chat_template(_as_parts(messages), add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    expanded = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * n_image_tokens)
    ids: list[int] = processor.tokenizer(expanded, add_special_tokens=not (bos and text.startswith(bos))).input_ids
    return ids


def _require_equal_ids(processor: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
    tried = 0
    for conversation in _conversations(tokenizer):
        try:
            rendered = render(conversation, tokenizer, n_image_tokens=2, max_length=100_000, generation_prompt=True)
        except ConversationError:
            continue  # a template without system messages, say
        tried += 1
        ours = [processor.image_token_id if token == IMAGE_TOKEN_ID else token for token in rendered.input_ids]
        theirs = processor_ids(processor, conversation, 2)
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
            found = [tokenizer.decode(some[max(0, at - 2) : at + 3]) for some in (ours, theirs)]
            raise ExportError(
                f"the chat template cannot be exported exactly: a processor tokenizes {found[1]!r} otherwise than this "
                f"model was trained on ({found[0]!r}); --inexact-ids (exact_ids=False) accepts that"
            )
    if not tried:
        raise ExportError("the chat template renders no conversation")


def _conversations(tokenizer: "PreTrainedTokenizerBase") -> list[list[Message]]:
    """Conversations with images at every place, and texts that begin and end in different kinds of characters."""
    # Words that the vocabulary holds with the space before them: a space beside them in the template is telling.
    spaced = sorted(t[1:] for t in tokenizer.get_vocab() if t[0] in "Ġ▁" and t[1:].isascii() and t[1:].isalpha())
    image = ImagePart()

    def turn(role: Role, *parts: str | ImagePart) -> Message:
        return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))

    first = turn("user", image, "What colour is the circle?")
    conversations = [
        [turn("system", "Be brief."), first],
        [first, turn("assistant", "Blue"), turn("user", "And\n\nthe square?")],
        [turn("user", "Compare:", image, "with", image)],
        [turn("user", image)],
    ]
    texts = ("Hello", "why?", "3 + 4 = 7", '"quoted"', "(a)", "... and then...", "été", "東京", "#1!", "a\n- b")
    for text in (*texts, *spaced[:3], *spaced[-3:]):
        conversations.append([turn("user", text), turn("assistant", text), turn("user", text, image)])
    return conversations


def _as_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in message.parts
            ],
        }
        for message in messages
    ]
