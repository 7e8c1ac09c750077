"""A profile of tiny models that trains in seconds: a random CLIP, whose features are computed as training goes, and a
random LM in NF4."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.local import quieten
from mmllm_core.config import Recipe, parse_config
from mmllm_core.data import easy_vqa
from mmllm_core.models.home import home
from mmllm_core.models.profile import load_profile
from tests.conftest import MakeTokenizer

TinyRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def tiny_home(
    tmp_path_factory: pytest.TempPathFactory,
    make_tokenizer: MakeTokenizer,
    tiny_clip: Callable[..., Path],
) -> Iterator[Path]:
    """A home with `tiny.yaml`, a profile; packages come from the usual home."""
    quieten()
    folder = tmp_path_factory.mktemp("home")
    easy_vqa.fetch()
    (folder / "packages").symlink_to(home() / "packages")
    save_tiny_lm(make_tokenizer("chatml"), folder / "lm")
    values = load_profile("embedded").model_dump(mode="json")
    values["vision"] |= {"source": {"kind": "path", "path": str(tiny_clip())}, "merge": 2}
    values["language"] |= {"source": {"kind": "path", "path": str(folder / "lm")}, "context_length": 512}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values | {"name": "tiny"}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMLLM_HOME", str(folder))
        yield folder


@pytest.fixture
def tiny_recipe(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRecipe:
    """Make a recipe of the tiny profile: an instruct stage of six steps and one worker, unless the test says so."""
    monkeypatch.setenv("MMLLM_HOME", str(tiny_home))  # not the home of the single test

    def build(name: str, **changes: object) -> Recipe:
        values: dict[str, object] = {
            "name": name,
            "profile": str(tiny_home / "tiny.yaml"),
            "stage": "instruct",
            "features": "real_time",
            "steps": 6,
            "batch_size": 4,
            "micro_batch": 2,
            "workers": 1,
            "lora": {"rank": 4},
            "learning_rates": {"connector": 1e-3, "lm": 1e-3},
            "checkpoint": {"every_steps": 2},
            "evaluation_questions": 0,
            "tracker": "none",
        }
        return parse_config(Recipe, values | changes, "test")

    return build


def save_tiny_lm(tokenizer: Any, folder: Path) -> None:
    """An LM of random weights, with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
