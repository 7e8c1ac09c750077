"""The folder of a Hugging Face LLaVA checkpoint: its configs, and its tensors by part.

In: a folder with `config.json`, safetensors and an image processor. Out: a checked `LlavaConfig` and tensors read one
at a time, named as in `CLIPVisionModel`, `MlpConnector` and a causal LM. Does not know bundles.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmllm_core.errors import WeightsError

if TYPE_CHECKING:
    from transformers import LlavaConfig

LANGUAGE_TYPES = ("llama", "phi3")
"""LM architectures (`model_type`) that can be imported."""


_NOT_WEIGHTS = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Buffers that old checkpoints hold and that models compute by themselves."""


class LlavaCheckpoint:
    """The tensors of a LLaVA checkpoint by part, whichever of its two layouts they are named in.

    Most files hold `language_model.model.*`, `language_model.lm_head.*`, `vision_tower.*` and
    `multi_modal_projector.*`; newer ones may hold `model.language_model.*`, `lm_head.*`, `model.vision_tower.*` and
    `model.multi_modal_projector.*`.

    Raises:
        WeightsError: a file is missing, cannot be read, or holds what is no part of LLaVA.
    """

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self._place: dict[tuple[str, str], tuple[Path, str]] = {}
        self.n_bytes = 0
        for path in _weight_files(folder):
            self.n_bytes += path.stat().st_size
            try:
                with safe_open(path, framework="pt") as stored:
                    names = [n for n in stored.keys() if not n.endswith(_NOT_WEIGHTS)]  # noqa: SIM118, not a dict
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"{path}: cannot be read as safetensors: {error}") from error
            self._place |= {_part_and_name(name, path): (path, name) for name in names}

    def names(self, part: str) -> list[str]:
        """Names of a part's tensors, in the order in which they lie on disk."""
        return [name for its_part, name in self._place if its_part == part]

    def shape(self, part: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the file's header."""
        return tuple(self._open(part, name, lambda stored, key: stored.get_slice(key).get_shape()))

    def tensor(self, part: str, name: str) -> Tensor:
        """Read one tensor."""
        weight: Tensor = self._open(part, name, lambda stored, key: stored.get_tensor(key))
        return weight

    def part(self, part: str) -> dict[str, Tensor]:
        """Read a whole part; for the small ones."""
        return {name: self.tensor(part, name) for name in self.names(part)}

    def _open(self, part: str, name: str, read: Any) -> Any:
        from safetensors import safe_open

        path, key = self._place[part, name]
        with safe_open(path, framework="pt") as stored:
            return read(stored, key)


def read_config(folder: Path) -> "LlavaConfig":
    """Read `config.json`, refusing what a bundle cannot hold before anything is converted.

    Raises:
        WeightsError: not LLaVA's, or a vision tower, LM, projector or choice of features that mmllm does not have.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlavaConfig

    values = _read_json(folder / "config.json")
    model_type = values.get("model_type")
    if model_type != "llava":
        raise WeightsError(f"{folder}: is not a LLaVA checkpoint: its model_type is '{model_type}', not 'llava'")
    vision_type = (values.get("vision_config") or {}).get("model_type", "clip_vision_model")
    if vision_type != "clip_vision_model":
        raise WeightsError(f"{folder}: its vision tower is '{vision_type}' and only CLIP can be imported")
    language_type = (values.get("text_config") or {}).get("model_type", "llama")
    if language_type not in LANGUAGE_TYPES:
        raise WeightsError(
            f"{folder}: its LM is '{language_type}' and only {' and '.join(LANGUAGE_TYPES)} can be imported"
        )
    try:
        config = LlavaConfig.from_dict(values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise WeightsError(f"{folder}: its config.json does not hold together: {error}") from error
    if not isinstance(config.vision_feature_layer, int):
        raise WeightsError(
            f"{folder}: takes features from several layers {config.vision_feature_layer} and a bundle from one"
        )
    if config.projector_hidden_act != "gelu":
        raise WeightsError(f"{folder}: its projector uses '{config.projector_hidden_act}' and a bundle's uses gelu")
    return config


def read_processor(folder: Path) -> dict[str, Any]:
    """The image processor's settings, from either file that transformers keeps them in.

    Raises:
        WeightsError: no such file, or one that does not say how pixels are normalised.
    """
    if (folder / "preprocessor_config.json").is_file():
        processor = _read_json(folder / "preprocessor_config.json")
    else:
        processor = _read_json(folder / "processor_config.json").get("image_processor", {})
    if not processor.get("image_mean") or not processor.get("image_std"):
        raise WeightsError(f"{folder}: its image processor does not say 'image_mean' and 'image_std'")
    return processor


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        paths = [folder / file for file in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    else:
        paths = [single]
    for path in paths:
        if not path.is_file():
            raise WeightsError(f"{path}: missing: the checkpoint must be whole and in safetensors format")
    return paths


def _part_and_name(key: str, path: Path) -> tuple[str, str]:
    """The part that a tensor belongs to, and its name in our layout of that part."""
    head, _, rest = key.removeprefix("model.").partition(".")
    if head == "lm_head":
        return "language", f"lm_head.{rest}"
    if head == "language_model":
        return "language", rest if rest.startswith("lm_head.") else "model." + rest.removeprefix("model.")
    if head == "vision_tower":
        return "vision", rest.removeprefix("vision_model.")
    if head == "multi_modal_projector":
        return "connector", rest
    raise WeightsError(f"{path}: tensor '{key}' has no place in a LLaVA checkpoint")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config
    except FileNotFoundError:
        raise WeightsError(f"{path}: missing: the folder is not a LLaVA checkpoint") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error
