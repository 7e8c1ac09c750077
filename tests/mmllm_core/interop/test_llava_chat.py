"""The chat template of an imported checkpoint: what is chosen, and that it takes contents as strings."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmllm_core.errors import WeightsError
from mmllm_core.interop.llava_chat import load_chat_tokenizer
from mmllm_core.language import load_tokenizer
from tests.conftest import CHATML, PHI3, MakeTokenizer

LISTS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Takes contents as lists of parts, as the templates of LLaVA processors do."""

PHI3_FIRST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
)
"""As Phi-3-mini was first published: drops system messages, and opens the answer without being asked to."""

REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def rendered(tokenizer: Any, *, system: str | None = None) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "hi"})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_the_tokenizers_own_template_is_kept(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    assert rendered(load_chat_tokenizer(tmp_path)).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_is_given_goes_first(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    assert rendered(load_chat_tokenizer(tmp_path, PHI3)) == "<|user|>\nhi<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_processors_template_of_lists_takes_strings(file: str, make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer(None).save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps({"chat_template": LISTS}))
    assert rendered(load_chat_tokenizer(tmp_path)) == "<|user|>hi<|end|><|assistant|>"


def test_phi3s_control_tokens_stand_in_for_a_template(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer(None).save_pretrained(tmp_path)
    assert rendered(load_chat_tokenizer(tmp_path)) == "<|user|>\nhi<|end|>\n<|assistant|>\n"


def test_a_template_that_drops_messages_is_refused(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="cannot be used"):
        load_chat_tokenizer(tmp_path, "{{ messages[0].content }}")


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no tokenizer"):
        load_chat_tokenizer(tmp_path)


def test_bos_leads_where_the_tokenizer_adds_it(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(PHI3)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.save_pretrained(tmp_path)
    assert rendered(load_chat_tokenizer(tmp_path)) == "<|begin_of_text|><|user|>\nhi<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("template", [PHI3_FIRST, REFUSES_SYSTEM, LISTS], ids=["drops it", "refuses it", "has a place"])
def test_a_system_message_reaches_the_lm_before_the_question(
    template: str, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    make_tokenizer(template).save_pretrained(tmp_path)
    text = rendered(load_chat_tokenizer(tmp_path), system="Be brief.")
    assert text.count("Be brief.") == text.count("hi") == 1
    assert text.index("Be brief.") < text.index("hi")


def test_a_system_message_that_has_no_place_opens_the_users_turn(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer(PHI3_FIRST).save_pretrained(tmp_path)
    tokenizer = load_chat_tokenizer(tmp_path)
    assert rendered(tokenizer, system="Be brief.") == (
        "<|begin_of_text|><|user|>\nBe brief.\nhi<|end|>\n<|assistant|>\n"
    )
    assert rendered(tokenizer) == "<|begin_of_text|><|user|>\nhi<|end|>\n<|assistant|>\n"


def test_the_settled_template_is_what_a_bundle_loads(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer(PHI3_FIRST).save_pretrained(tmp_path)
    settled = load_chat_tokenizer(tmp_path)
    settled.save_pretrained(tmp_path / "saved")
    assert rendered(load_tokenizer(tmp_path / "saved"), system="s") == rendered(settled, system="s")
