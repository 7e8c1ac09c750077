"""Recipes: how a CLIP model or the multimodal LM is trained."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mmllm_core.config.data import DataConfig
from mmllm_core.config.profile import LoraConfig, Name
from mmllm_core.config.reading import StrictModel


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

    name: Name
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
