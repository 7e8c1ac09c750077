"""Recipes: how a CLIP model or the multimodal LM is trained."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmllm_core.config.connectors import ConnectorConfig
from mmllm_core.config.data import ChatData, DataConfig, absolute
from mmllm_core.config.profile import LoraConfig, Name, Profile
from mmllm_core.config.reading import StrictModel
from mmllm_core.errors import ConfigError

Part = Literal["connector", "lm", "vision"]
"""What may be trained, each at a learning rate of its own."""
Schedule = Literal["cosine", "linear", "constant"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]


class ClipRecipe(StrictModel):
    """Contrastive training of a CLIP model with open_clip.

    `architecture` is open_clip's own model config (embed_dim, vision_cfg, text_cfg).
    """

    name: Name
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
    """Which conversations share a batch, in which they lie end to end and none sees another."""

    grouping: Literal["none", "length", "modality"] = "none"
    """Conversations of like length share a step; `modality` also keeps text apart from images, as LLaVA does."""
    pack_tokens: int | None = Field(default=None, gt=0)
    """Fill batches by tokens instead: each holds `micro_batch` times as many conversations as fit this many."""
    window: int = Field(default=16, gt=0)
    """How many steps' worth of conversations are looked over at once when they are grouped."""


class ZeroConfig(StrictModel):
    """What DeepSpeed shares among workers or keeps in CPU memory (arXiv:1910.02054, arXiv:2101.06840)."""

    stage: Literal[0, 1, 2, 3] = 2
    """1 shares optimizer states, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @model_validator(mode="after")
    def _offload_has_its_stage(self) -> "ZeroConfig":
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs ZeRO stage 1, 2 or 3: set 'stage', or leave the optimizer be")
        if self.offload_parameters and self.stage != 3:
            raise ValueError("offload_parameters needs ZeRO stage 3, which alone shares parameters: set 'stage: 3'")
        return self


class LearningRates(StrictModel):
    """Peak learning rate of each part of the model; what a stage does not train has none."""

    connector: float | None = Field(default=None, gt=0)
    lm: float | None = Field(default=None, gt=0)
    """Of the adapter, or of the whole LM where the recipe has no `lora`."""
    vision: float | None = Field(default=None, gt=0)


class CheckpointConfig(StrictModel):
    """When a run saves what it needs to go on, and where."""

    every_steps: int = Field(default=100, gt=0)
    keep: int = Field(default=2, gt=0)
    """Checkpoints kept: the last one always, the others by lowest smoothed loss."""
    storage: str | None = None
    """A folder that all workers see, or a URL (`s3://`, `gs://`, or any of fsspec's); under MMLLM_HOME if not given."""

    @field_validator("storage")
    @classmethod
    def _not_of_this_folder(cls, storage: str | None) -> str | None:
        return storage if storage is None or "://" in storage else str(absolute(Path(storage)))


class Recipe(StrictModel):
    """One training stage of the multimodal LM.

    | stage | trains |
    |---|---|
    | `align` | the connector alone |
    | `instruct` | the connector and a LoRA adapter |
    | `text` | the LM on text alone: an adapter, or all of it without `lora` |
    | `end_to_end` | the connector and the LM, and CLIP's vision tower where it has a learning rate |
    """

    name: Name
    profile: str
    stage: Literal["align", "instruct", "text", "end_to_end"]
    from_bundle: Name | None = None
    """Start from what an earlier stage trained."""
    connector: ConnectorConfig | None = None
    """Instead of the profile's."""
    data: DataConfig = DataConfig()
    features: Literal["stored", "real_time"] = "stored"
    """Images' features from the feature store, or from CLIP as training goes."""
    steps: int = Field(gt=0)
    batch_size: int = Field(default=8, gt=0)
    """Conversations of an optimizer step, over all workers: the same ones however many workers there are."""
    micro_batch: int = Field(default=4, gt=0)
    """Conversations a worker takes at once; gradients are accumulated until the step's share is through."""
    batching: BatchingConfig = BatchingConfig()
    word_alignment_steps: int = Field(default=0, ge=0)
    """Steps that first put images near their captions' words, without the LM (`mmllm_core.word_alignment`)."""
    word_alignment_learning_rate: float = Field(default=5e-4, gt=0)
    lora: LoraConfig | None = LoraConfig()
    learning_rates: LearningRates
    schedule: Schedule = "cosine"
    warmup_steps: int = Field(default=4, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What a loss that is not finite does: end the run, or leave its micro-batch out."""
    zero: ZeroConfig = ZeroConfig()
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    workers: int = Field(default=2, gt=0)
    min_workers: int | None = Field(default=None, gt=0)
    """Go on with as few as this where `workers` are not to be had, and grow again when they are."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """1 where Ray has that many, else 0, if not given."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    max_restarts: int = Field(default=3, ge=-1)
    """How often a run starts again by itself after a worker died; -1 for always."""
    tracker: Tracker = "tensorboard"
    evaluation_questions: int = Field(default=300, ge=0)
    """Held-out questions asked before and after training; 0 asks none."""
    seed: int = 0

    @field_validator("profile")
    @classmethod
    def _not_of_this_folder(cls, profile: str) -> str:
        return str(absolute(Path(profile))) if profile.endswith((".yaml", ".yml")) else profile

    @property
    def trained(self) -> tuple[Part, ...]:
        """The parts that have a learning rate."""
        return tuple(part for part in ("connector", "lm", "vision") if getattr(self.learning_rates, part) is not None)

    @property
    def needs_images(self) -> bool:
        """Whether any source has some."""
        return not all(isinstance(source, ChatData) for source in self.data.sources)

    @model_validator(mode="after")
    def _stage_says_what_is_trained(self) -> "Recipe":
        needed, allowed = {
            "align": ({"connector"}, {"connector"}),
            "instruct": ({"connector", "lm"}, {"connector", "lm"}),
            "text": ({"lm"}, {"lm"}),
            "end_to_end": ({"connector", "lm"}, {"connector", "lm", "vision"}),
        }[self.stage]
        trained = set(self.trained)
        article = "an" if self.stage[0] in "aeiou" else "a"
        if lacking := sorted(needed - trained):
            raise ValueError(f"{article} {self.stage} stage trains the {lacking[0]}: give learning_rates.{lacking[0]}")
        if surplus := sorted(trained - allowed):
            raise ValueError(
                f"{article} {self.stage} stage does not train the {surplus[0]}: remove learning_rates.{surplus[0]}"
            )
        if self.stage == "align" and self.lora is not None:
            raise ValueError("an align stage trains the connector alone: set 'lora: null'")
        if self.stage == "instruct" and self.lora is None:
            raise ValueError("an instruct stage trains an adapter: give 'lora'")
        if self.connector is not None and self.from_bundle is not None:
            raise ValueError("the bundle's own connector goes on being trained: leave 'connector' out")
        return self

    @model_validator(mode="after")
    def _data_suits_the_stage(self) -> "Recipe":
        if self.stage == "text":
            if with_images := [s.label for s in self.data.sources if not isinstance(s, ChatData)]:
                raise ValueError(f"a text stage learns from chat files alone: '{with_images[0]}' has images")
            if self.word_alignment_steps:
                raise ValueError("a text stage has no images to align to words: set 'word_alignment_steps: 0'")
        if "vision" in self.trained and self.features != "real_time":
            raise ValueError("features change while the vision tower is trained: set 'features: real_time'")
        return self

    @model_validator(mode="after")
    def _workers_have_work(self) -> "Recipe":
        if self.batch_size < self.workers:
            raise ValueError(f"a batch_size of {self.batch_size} leaves some of {self.workers} workers idle: raise it")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        return self


def check_recipe(recipe: Recipe, profile: Profile) -> None:
    """Refuse combinations of recipe and profile that cannot work, before anything is loaded.

    Raises:
        ConfigError: the message says which settings contradict each other and why.
    """
    language = profile.language
    if language.dtype == "float16":
        raise ConfigError("language.dtype float16 needs loss scaling, which training does not do: use bfloat16")
    trains_all_of_lm = "lm" in recipe.trained and recipe.lora is None
    if trains_all_of_lm and language.quantization != "none":
        raise ConfigError(
            f"the {recipe.stage} stage without 'lora' trains every weight of the LM, and those of profile "
            f"'{profile.name}' are {language.quantization}: give 'lora', or a profile with quantization none"
        )
    if language.quantization == "int8" and recipe.zero.stage == 3:
        raise ConfigError(
            "ZeRO stage 3 shards floating-point weights, and bitsandbytes' int8 weights are integers: use stage 2, "
            "or quantization nf4, which is stored as bfloat16"
        )
