"""The baseline of `bench_training`: the same multimodal LM, tuned with Hugging Face's `Trainer` and peft.

In: a `Setup`. Out: `Step`s. It is what the libraries' documentation leads to: images are decoded and go through CLIP as
training goes, conversations are padded to the longest of their batch in the order in which they are drawn, logits are
made at every position for the LM's own loss, and one process runs on all cores.
"""

import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmllm_core.conversation import IGNORE_INDEX, render
from mmllm_core.data.collate import collate
from mmllm_core.data.mixture import training_samples
from mmllm_core.language import load_tokenizer
from mmllm_core.model import MultimodalLM
from mmllm_core.vision import ClipEncoder
from tests.bench.training_loops import Setup, Step
from train_jobs.origins import build_model
from train_jobs.zero import BETAS


class LlavaForTraining(nn.Module):
    """CLIP, connector and LM as `LlavaForConditionalGeneration` joins them: the LM gets labels and makes the loss."""

    def __init__(self, model: MultimodalLM):
        super().__init__()
        self.model = model
        self.counts: list[tuple[int, int, int]] = []
        """Samples, supervised tokens and tokens of each forward."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, pixels: Tensor, **loss: Any) -> Any:
        """Loss, and logits (b, t, vocab)."""
        supervised = (labels != IGNORE_INDEX).sum(1)  # (b,)
        self.counts.append((int((supervised > 0).sum()), int(supervised.sum()), int(attention_mask.sum())))
        embeddings = self.model.embed(input_ids, self.model.see(pixels))  # (b, t, d_model)
        return self.model.lm(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **loss)


class Conversations(IterableDataset):
    """Rendered conversations with their images' pixels."""

    def __init__(self, setup: Setup, encoder: ClipEncoder):
        self.setup = setup
        self.encoder = encoder
        self.tokenizer = load_tokenizer(setup.origins.language)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        recipe, profile = self.setup.recipe, self.setup.profile
        samples = training_samples(recipe.data, recipe.seed)
        for sample in islice(samples, recipe.steps * recipe.batch_size):
            rendered = render(
                sample.messages,
                tokenizer=self.tokenizer,
                n_image_tokens=profile.connector.n_tokens(self.encoder.n_patches),
                max_length=profile.language.context_length,
                generation_prompt=False,
            )
            pixels = self.encoder.preprocess([Image.open(path).convert("RGB") for path in sample.images])
            yield {"rendered": rendered, "pixels": pixels}  # (n_images, 3, h, w)


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch as long as its longest conversation."""
    pixels = [image.numpy() for row in rows for image in row["pixels"]]
    batch = collate([row["rendered"] for row in rows], pixels)
    assert batch.pixels is not None
    return {
        "input_ids": batch.input_ids,  # (b, t)
        "attention_mask": batch.attention_mask,  # (b, t)
        "labels": batch.labels,  # (b, t)
        "pixels": batch.pixels,  # (n_images, 3, h, w)
    }


class _Clock(TrainerCallback):
    """When steps ended: a step is all between two ends, data included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def hf_trainer_steps(setup: Setup) -> list[Step]:
    """Steps of `Trainer.train`, of as many samples as the recipe's."""
    recipe = setup.recipe
    encoder = ClipEncoder(setup.profile.vision, setup.origins.vision)
    model = LlavaForTraining(build_model(recipe, setup.profile, setup.origins, "cpu", encoder))
    clock = _Clock()
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.micro_batch,
            gradient_accumulation_steps=recipe.batch_size // recipe.micro_batch,
            learning_rate=recipe.learning_rates.lm or 0.0,
            lr_scheduler_type=recipe.schedule,
            warmup_steps=recipe.warmup_steps,
            weight_decay=recipe.weight_decay,
            adam_beta2=BETAS[1],
            max_grad_norm=recipe.max_grad_norm,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=recipe.seed,
        )
        trainer = Trainer(
            model, arguments, data_collator=pad, train_dataset=Conversations(setup, encoder), callbacks=[clock]
        )
        torch.manual_seed(recipe.seed)
        trainer.train()
    n = recipe.batch_size // recipe.micro_batch
    counts = [tuple(map(sum, zip(*model.counts[at : at + n], strict=True))) for at in range(0, len(model.counts), n)]
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    return [Step(taken, *count) for taken, count in zip(seconds, counts, strict=True)]
