"""The saved assistant: what was trained, and pinned references to what was not.

    bundle.json             profile, recipe, versions, data hashes, metrics, feature fingerprint
    connector.safetensors   the connector's weights
    adapter/                the LoRA adapter in peft's own format, if one was trained
    vision/                 CLIP weights, if they are not to be had elsewhere
    language/               LM weights, if they are not to be had elsewhere (imported checkpoints)
    tokenizer/              the tokenizer
    manifest.json           sha256 of every file above; checked whenever a bundle is opened

safetensors only; nothing in a bundle is unpickled.
"""

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mmllm_core.artifact import STAMP, building
from mmllm_core.config import Dtype, Name, PathSource, Profile, Quantization, Sha256, Source, StrictModel, parse_config
from mmllm_core.errors import BundleError
from mmllm_core.models.home import home
from mmllm_core.models.resolve import resolve
from mmllm_core.vision import ClipEncoder, file_sha256

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.connectors import Connector
    from mmllm_core.model import MultimodalLM
    from mmllm_core.text_tower import ClipTextEncoder

FORMAT = 1
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "ray", "open_clip_torch", "mmllm")

WeightsSource = Path | Callable[[Path], None]
"""Weights that a bundle carries: a folder to copy, or a function that writes them into the folder it is given."""


class MergedAdapter(StrictModel):
    """How the LM that a bundle carries came of a quantized base and an adapter (`mmllm_core.merging`)."""

    bundle: str
    """Name of the bundle whose base and adapter were merged."""
    adapter_sha256: Sha256 | None
    """Of the adapter's weights; None if there was no adapter and the base was dequantized alone."""
    quantization: Quantization
    """What the base was dequantized from."""
    dtype: Dtype
    method: Literal["dequantize, then add the LoRA update in float32"] = (
        "dequantize, then add the LoRA update in float32"
    )


class BundleInfo(StrictModel):
    """`bundle.json`."""

    format: int = FORMAT
    name: Name
    profile: Profile
    """As resolved: sources inside the bundle are relative paths."""
    d_vision: int
    n_patches: int
    feature_fingerprint: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    merged: MergedAdapter | None = None
    """Set where the LM holds what was an adapter."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: verified, nothing loaded yet."""

    folder: Path
    info: BundleInfo

    @classmethod
    def open(cls, folder: Path) -> "Bundle":
        """Open and verify a bundle.

        Raises:
            BundleError: not a bundle, of another format, incomplete, or altered.
            ConfigError: `bundle.json` holds keys that this mmllm does not know.
        """
        manifest = _read_json(folder, "manifest.json")
        for name, digest in manifest.items():
            if not (folder / name).is_file():
                raise BundleError(f"{folder}: '{name}' is missing: train or import the bundle again")
            if file_sha256(folder / name) != digest:
                raise BundleError(f"{folder}: '{name}' was altered (sha256 differs): train or import the bundle again")
        values = _read_json(folder, "bundle.json")
        if values.get("format") != FORMAT:
            raise BundleError(f"{folder}: bundle format {values.get('format')} and this mmllm reads format {FORMAT}")
        return cls(folder, parse_config(BundleInfo, values, str(folder / "bundle.json")))

    @classmethod
    def latest(cls) -> "Bundle":
        """The bundle that was made last on this machine.

        Raises:
            BundleError: none was made yet.
        """
        pointer = bundles_folder() / "latest"
        if not pointer.is_file():
            raise BundleError(f"{pointer.parent}: no bundle yet: run 'make demo', or 'mmllm train embedded-instruct'")
        return cls.open(pointer.parent / pointer.read_text(encoding="utf-8").strip())

    def digests(self, folder: str) -> dict[str, str]:
        """sha256 of every file below a folder of the bundle, by its path, as the manifest has it."""
        manifest = _read_json(self.folder, "manifest.json")
        return {name: digest for name, digest in manifest.items() if name.startswith(f"{folder}/")}

    @property
    def profile(self) -> Profile:
        """Which weights the assistant is made of."""
        return self.info.profile

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The LM's tokenizer, with its chat template."""
        from mmllm_core.language import load_tokenizer

        return load_tokenizer(self.folder / "tokenizer")

    def weights(self, source: Source) -> Path:
        """Local folder of one of the profile's sources."""
        return resolve(source, relative_to=self.folder)

    def load_vision(self, device: str = "cpu") -> ClipEncoder:
        """Load the CLIP encoder.

        Raises:
            BundleError: the weights give other features than the connector was trained on.
        """
        encoder = ClipEncoder(self.profile.vision, self.weights(self.profile.vision.source), device)
        if encoder.fingerprint != self.info.feature_fingerprint:
            raise BundleError(
                f"{self.folder}: the CLIP weights have fingerprint {encoder.fingerprint} and the connector was trained "
                f"on {self.info.feature_fingerprint}"
            )
        return encoder

    def load_text_tower(self, device: str = "cpu") -> "ClipTextEncoder | None":
        """Load CLIP's text tower, or None where the bundle's CLIP has none that belongs to its vision tower."""
        from mmllm_core.text_tower import ClipTextEncoder, has_text_tower

        weights = self.weights(self.profile.vision.source)
        trained_apart = self.info.recipe.get("stage") == "end_to_end"
        return None if trained_apart or not has_text_tower(weights) else ClipTextEncoder(weights, device)

    def load_model(self, device: str = "cpu") -> "MultimodalLM":
        """Load LM, adapter and connector, frozen and in eval mode."""
        from mmllm_core.language import load_adapter, load_language_model
        from mmllm_core.model import MultimodalLM

        lm: Any = load_language_model(self.profile.language, self.weights(self.profile.language.source), device)
        connector = self.load_connector(lm.config)
        if self.adapter:
            lm = load_adapter(lm, self.adapter)
        return MultimodalLM(lm, connector.to(device)).eval().requires_grad_(False)

    def load_connector(self, lm_config: Any) -> "Connector":
        """Load the connector, for an LM of such a config."""
        from safetensors.torch import load_file

        from mmllm_core.connectors import LmShape, build_connector

        connector = build_connector(self.profile.connector, self.info.d_vision, LmShape.of(lm_config))
        connector.load_state_dict(load_file(self.folder / "connector.safetensors"))
        return connector

    @property
    def adapter(self) -> Path | None:
        """Folder of the LM's adapter, in peft's format, if there is one."""
        folder = self.folder / "adapter"
        return folder if folder.is_dir() else None


def save_bundle(
    info: BundleInfo,
    connector: "Connector",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    adapter: "nn.Module | Path | None" = None,
    vision_weights: WeightsSource | None = None,
    language_weights: WeightsSource | None = None,
    make_latest: bool = True,
) -> Bundle:
    """Write a bundle into the bundles folder and open it again. The LM itself need not be in memory.

    Args:
        adapter: the LM as peft wrapped it (`MultimodalLM.adapter`), or a folder in which `save_adapter` put one, or
            None if no adapter was trained.
        vision_weights, language_weights: weights that are not to be had elsewhere; the profile's source then
            points into the bundle.
        make_latest: whether `mmllm serve` starts from it.

    Raises:
        BundleError: a trainable parameter would be left out.
    """
    from safetensors.torch import save_file

    profile = info.profile
    if vision_weights:
        profile = profile.model_copy(update={"vision": _rebased(profile.vision, "vision")})
    if language_weights:
        profile = profile.model_copy(update={"language": _rebased(profile.language, "language")})
    versions = {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    info = info.model_copy(update={"profile": profile, "versions": versions})

    folder = bundles_folder() / info.name
    with building(folder, {"bundle": info.name}) as scratch:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in connector.state_dict().items()}
        save_file(state, scratch / "connector.safetensors")
        if isinstance(adapter, Path):
            shutil.copytree(adapter, scratch / "adapter")
        elif adapter is not None:
            save_adapter(adapter, scratch / "adapter")
        tokenizer.save_pretrained(scratch / "tokenizer")
        for name, weights in (("vision", vision_weights), ("language", language_weights)):
            if weights:
                _place_weights(weights, scratch / name)
        (scratch / "bundle.json").write_text(info.model_dump_json(indent=2), encoding="utf-8")
        files = sorted(p for p in scratch.rglob("*") if p.is_file())
        manifest = {p.relative_to(scratch).as_posix(): file_sha256(p) for p in files}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    if make_latest:
        (bundles_folder() / "latest").write_text(info.name, encoding="utf-8")
    return Bundle.open(folder)


def bundles_folder() -> Path:
    """Where bundles are kept."""
    return home() / "bundles"


def save_adapter(adapter: Any, folder: Path) -> None:
    """Write a LoRA adapter in peft's own format.

    Args:
        adapter: the LM as peft wrapped it.

    Raises:
        BundleError: a trainable parameter would be left out.
    """
    from peft import get_peft_model_state_dict

    adapter.save_pretrained(folder, safe_serialization=True)
    # peft leaves the adapter's own name ("default") out of the keys that it saves.
    saved = {name.replace(".weight", ".default.weight") for name in get_peft_model_state_dict(adapter)}
    trained = {name for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    if left_out := trained - saved:
        raise BundleError(f"trained parameters would be left out of the bundle: {', '.join(sorted(left_out)[:3])}")


def _place_weights(weights: WeightsSource, folder: Path) -> None:
    if isinstance(weights, Path):
        shutil.copytree(weights, folder, ignore=shutil.ignore_patterns(STAMP))
    else:
        folder.mkdir()
        weights(folder)


def _rebased(part: Any, folder: str) -> Any:
    return part.model_copy(update={"source": PathSource(path=Path(folder))})


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{folder}: is not a bundle ('{name}' is missing)") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}: '{name}' cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise BundleError(f"{folder}: '{name}' cannot be read: it holds no mapping")
    return values
