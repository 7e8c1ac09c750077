"""Small files of conversations with real images, in the shapes that published files come in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmllm_core.models.home import home

WriteFile = Callable[..., Path]
PACKAGES = home() / "packages"
"""Where packages of the usual home lie; read before any test gets a home of its own."""


def llava(id: str, *texts: str, image: Any = None) -> dict[str, Any]:
    """A row in LLaVA's format: human and gpt take turns. Without `image` the key is missing."""
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]
    return {"id": id, "conversations": turns} | ({} if image is None else {"image": image})


def chat(*texts: Any, system: str | None = None) -> dict[str, Any]:
    """A row in the chat format: user and assistant take turns."""
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a.png, b.jpg and sub/c.webp."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, colour in {"a.png": "red", "b.jpg": "green", "sub/c.webp": "blue"}.items():
        Image.new("RGB", (24, 16), colour).save(folder / name)
    return folder


@pytest.fixture
def usual_packages(_home_of_the_test: None) -> None:
    """Packages come from the usual home: they are pinned by hash and large."""
    PACKAGES.mkdir(parents=True, exist_ok=True)
    home().mkdir(parents=True, exist_ok=True)
    (home() / "packages").symlink_to(PACKAGES)


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    """Write rows as a JSON array (`.json`) or as JSON Lines (`.jsonl`)."""

    def build(rows: list[Any], name: str = "rows.json") -> Path:
        path = tmp_path / name
        lines = name.endswith(".jsonl")
        path.write_text("\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows), encoding="utf-8")
        return path

    return build


@pytest.fixture
def tokenizer_folder(tokenizer: Any, tmp_path: Path) -> Path:
    """The tiny ChatML tokenizer, saved."""
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder
