"""Whisper's weights from CTranslate2's layout to openai-whisper's, name by name, so that both run the same numbers.

In: a folder with `model.bin` and `config.json`. Out: a folder with `model.safetensors` (names, shapes and dtypes of
openai-whisper's `model_state_dict`) and `dims.json` (its `dims`, and which heads align words), made once and kept under
`MMLLM_HOME`. Does not know how either is run.
"""

import json
import mmap
import struct
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmllm_core.artifact import building, is_built, require_free_disk
from mmllm_core.errors import WeightsError
from mmllm_core.models.home import home
from mmllm_core.vision import file_sha256

WEIGHTS = "model.safetensors"
DIMENSIONS = "dims.json"
_CONVERSION = 1
"""Raise it when the conversion changes, so that older conversions are made anew."""
_BINARY_VERSION = 6
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""CTranslate2's numbers for them; 5 is bfloat16, which numpy lacks."""
_HEAD = 64
"""Width of an attention head in every Whisper."""
Tensors = dict[str, NDArray[Any]]


def openai_whisper_weights(folder: Path) -> Path:
    """Convert once.

    Args:
        folder: a Whisper model in CTranslate2 layout, not quantized (float16 or float32).

    Returns:
        Folder of `WEIGHTS` and `DIMENSIONS`.

    Raises:
        WeightsError: the folder holds no such model.
        EnvironmentLack: no space.
    """
    from safetensors.numpy import save_file

    binary = folder / "model.bin"
    if not binary.is_file():
        raise WeightsError(f"{folder}: not a Whisper model in CTranslate2 layout: it has no model.bin")
    digest = file_sha256(binary)
    inputs = {"model.bin": digest, "conversion": _CONVERSION}
    target = home() / "openai-whisper" / digest[:16]
    if is_built(target, inputs):
        return target
    require_free_disk(target, 2 * binary.stat().st_size / 1e9, "converting Whisper")
    tensors = dict(_renamed(read_variables(binary), binary))
    with building(target, inputs) as scratch:
        save_file(tensors, scratch / WEIGHTS)
        dims = _dimensions(tensors) | {"alignment_heads": _alignment_heads(folder)}
        (scratch / DIMENSIONS).write_text(json.dumps(dims), encoding="utf-8")
    return target


def read_variables(binary: Path) -> Tensors:
    """The variables of a CTranslate2 `model.bin` (`ctranslate2.specs.model_spec.ModelSpec._serialize`).

    Raises:
        WeightsError: of another kind or version, cut short, or of a dtype that is not read.
    """
    try:
        with binary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return dict(_variables(_Reader(data)))
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise WeightsError(f"{binary}: not a Whisper model in CTranslate2 layout: {error}") from error


class _Reader:
    """Reads fields one after another."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._at = 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return int(value)

    def string(self) -> str:
        length = self.number("H")  # with a zero at its end
        return self.take(length)[:-1].decode()

    def take(self, n_bytes: int) -> bytes:
        piece = self._data[self._at : self._at + n_bytes]
        if len(piece) != n_bytes:
            raise ValueError("the file is cut short")
        self._at += n_bytes
        return piece


def _variables(reader: _Reader) -> Iterator[tuple[str, NDArray[Any]]]:
    version, kind, _revision = reader.number("I"), reader.string(), reader.number("I")
    if (version, kind) != (_BINARY_VERSION, "WhisperSpec"):
        raise ValueError(f"it holds a {kind} in format {version}, and WhisperSpec in {_BINARY_VERSION} is read")
    for _ in range(reader.number("I")):
        name = reader.string()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        number = reader.number("B")
        data = reader.take(reader.number("I"))
        if number not in _DTYPES:
            raise ValueError(f"{name} has a dtype that is not read")
        yield name, np.frombuffer(data, dtype=_DTYPES[number]).reshape(shape)


def _renamed(found: Tensors, binary: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """The variables under openai-whisper's names; fused projections are taken apart."""
    if quantized := [name for name in found if name.endswith("weight_scale")]:
        raise WeightsError(f"{binary}: {quantized[0]}: quantized weights are not converted: give those in float16")
    try:
        for side in ("encoder", "decoder"):
            yield f"{side}.positional_embedding", found[f"{side}/position_encodings/encodings"]
        for conv in ("conv1", "conv2"):
            yield from _pair(found, f"encoder/{conv}", f"encoder.{conv}")
        yield from _norm(found, "encoder/layer_norm", "encoder.ln_post")
        yield "decoder.token_embedding.weight", found["decoder/embeddings/weight"]
        yield from _norm(found, "decoder/layer_norm", "decoder.ln")
        for side in ("encoder", "decoder"):
            for i in count():
                if f"{side}/layer_{i}/ffn/layer_norm/beta" not in found:
                    break
                yield from _block(found, f"{side}/layer_{i}", f"{side}.blocks.{i}")
    except KeyError as error:
        raise WeightsError(f"{binary}: not a Whisper model: it has no {error}") from None


def _block(found: Tensors, theirs: str, ours: str) -> Iterator[tuple[str, NDArray[Any]]]:
    yield from _norm(found, f"{theirs}/self_attention/layer_norm", f"{ours}.attn_ln")
    yield from _attention(found, f"{theirs}/self_attention", f"{ours}.attn", (("query", "key", "value"), ("out",)))
    if f"{theirs}/attention/linear_0/weight" in found:
        yield from _norm(found, f"{theirs}/attention/layer_norm", f"{ours}.cross_attn_ln")
        parts = (("query",), ("key", "value"), ("out",))
        yield from _attention(found, f"{theirs}/attention", f"{ours}.cross_attn", parts)
    yield from _norm(found, f"{theirs}/ffn/layer_norm", f"{ours}.mlp_ln")
    yield from _pair(found, f"{theirs}/ffn/linear_0", f"{ours}.mlp.0")
    yield from _pair(found, f"{theirs}/ffn/linear_1", f"{ours}.mlp.2")


def _attention(
    found: Tensors, theirs: str, ours: str, linears: tuple[tuple[str, ...], ...]
) -> Iterator[tuple[str, NDArray[Any]]]:
    for i, parts in enumerate(linears):
        for kind in ("weight", "bias"):
            pieces = np.split(found[f"{theirs}/linear_{i}/{kind}"], len(parts))  # (d,) or (d, d) each
            for part, piece in zip(parts, pieces, strict=True):
                if (part, kind) != ("key", "bias"):  # keys have none; fused, it is zero
                    yield f"{ours}.{part}.{kind}", np.ascontiguousarray(piece)


def _pair(found: Tensors, theirs: str, ours: str) -> Iterator[tuple[str, NDArray[Any]]]:
    for kind in ("weight", "bias"):
        yield f"{ours}.{kind}", found[f"{theirs}/{kind}"]


def _norm(found: Tensors, theirs: str, ours: str) -> Iterator[tuple[str, NDArray[Any]]]:
    yield f"{ours}.weight", found[f"{theirs}/gamma"]
    yield f"{ours}.bias", found[f"{theirs}/beta"]


def _dimensions(tensors: Tensors) -> dict[str, Any]:
    """Fields of `whisper.model.ModelDimensions`."""
    n_audio_ctx, n_audio_state = tensors["encoder.positional_embedding"].shape
    n_text_ctx, n_text_state = tensors["decoder.positional_embedding"].shape
    return {
        "n_mels": tensors["encoder.conv1.weight"].shape[1],
        "n_audio_ctx": n_audio_ctx,
        "n_audio_state": n_audio_state,
        "n_audio_head": n_audio_state // _HEAD,
        "n_audio_layer": _blocks(tensors, "encoder"),
        "n_vocab": tensors["decoder.token_embedding.weight"].shape[0],
        "n_text_ctx": n_text_ctx,
        "n_text_state": n_text_state,
        "n_text_head": n_text_state // _HEAD,
        "n_text_layer": _blocks(tensors, "decoder"),
    }


def _blocks(tensors: Tensors, side: str) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith(f"{side}.blocks.")})


def _alignment_heads(folder: Path) -> list[list[int]] | None:
    """Layer and head of those whose attention follows the sound; None where the folder does not say."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get("alignment_heads") if isinstance(values, dict) else None
