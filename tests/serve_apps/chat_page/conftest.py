from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "Dot.JPG"
    Image.new("RGB", (4, 4), "red").save(path, "JPEG")
    return path


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "voice.mp3"
    path.write_bytes(b"not really sound")
    return path


def file_item(path: Path) -> dict[str, Any]:
    return {"type": "file", "file": {"path": str(path)}, "alt_text": None}


def said(role: str, *content: Any, kind: str | None = None) -> dict[str, Any]:
    return {"role": role, "content": list(content), "metadata": {"id": kind} if kind else None}
