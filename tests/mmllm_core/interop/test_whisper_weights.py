"""Whisper's weights from CTranslate2's layout to openai-whisper's."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmllm_core.errors import WeightsError
from mmllm_core.interop.whisper_weights import DIMENSIONS, WEIGHTS, openai_whisper_weights, read_variables
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve(load_profile("embedded").audio.source)


def test_every_number_keeps_its_value_under_its_new_name(tiny: Path) -> None:
    whisper = pytest.importorskip("whisper")
    folder = openai_whisper_weights(tiny)
    theirs, ours = read_variables(tiny / "model.bin"), load_file(folder / WEIGHTS)
    dims = json.loads((folder / DIMENSIONS).read_text())
    assert len(dims.pop("alignment_heads")) == 8
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**dims))
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.items()} == wanted
    query, key, value = np.split(theirs["decoder/layer_2/self_attention/linear_0/weight"], 3)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        assert np.array_equal(ours[f"decoder.blocks.2.attn.{name}.weight"], tensor)
    assert not np.split(theirs["decoder/layer_2/self_attention/linear_0/bias"], 3)[1].any()  # keys have no bias
    moved = sum(tensor.size for tensor in ours.values())
    kept = sum(t.size for n, t in theirs.items() if t.dtype == np.float16)
    biases_of_keys = sum(dims[f"n_{s}_layer"] * dims[f"n_{s}_state"] * n for s, n in (("audio", 1), ("text", 2)))
    assert moved == kept - biases_of_keys


def test_a_conversion_is_made_once(tiny: Path) -> None:
    folder = openai_whisper_weights(tiny)
    made = (folder / WEIGHTS).stat().st_mtime_ns
    assert (openai_whisper_weights(tiny) / WEIGHTS).stat().st_mtime_ns == made
    assert str(folder).startswith(os.environ["MMLLM_HOME"])


def test_what_is_no_whisper_model_is_one_named_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no model\.bin"):
        openai_whisper_weights(tmp_path)
    whole = (tiny / "model.bin").read_bytes()
    for data in (b"", b"PK\3\4" * 100, whole[:100], whole[: len(whole) // 2], struct.pack("<I", 5) + whole[4:]):
        (tmp_path / "model.bin").write_bytes(data)
        with pytest.raises(WeightsError, match="not a Whisper model in CTranslate2 layout"):
            openai_whisper_weights(tmp_path)
