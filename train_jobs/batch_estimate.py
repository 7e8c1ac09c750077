"""How many tokens a recipe's batches hold: by rendering some of its conversations, or, where that cannot be, by a
bound.

In: a recipe and its profile. Out: a `BatchEstimate`. Does not know features: an image is counted by its positions.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmllm_core.config import Profile, Recipe
from mmllm_core.data.batching import Encoded
from mmllm_core.data.sample import Sample
from mmllm_core.errors import ConversationError, DataError, MmllmError, WeightsError
from mmllm_core.models.resolve import resolve

SAMPLED = 64
"""Conversations that are rendered, at least."""
_NO_FEATURES = np.zeros((1, 1), np.float16)  # (n, d_vision)
"""Stands for an image, whose features are not wanted."""


@dataclass(frozen=True)
class BatchEstimate:
    """Rows of a worker's batches; a row is a conversation, or several packed."""

    longest: int
    """Positions of the longest row."""
    rows_per_step: float
    """Of a worker, over all micro-batches of a step."""
    mean: float
    """Positions of a row without padding."""
    mean_conversation: float
    """Positions of a conversation."""
    n_supervised: float
    """Supervised positions of a row in the batch that has most of them."""
    mean_supervised: float
    n_images: float
    """Images of a row in the batch that has most of them."""
    mean_images: float
    lengths: tuple[int, ...]
    """Positions of the rows of each batch, padding included."""
    source: str
    """Where the numbers come from, for a person."""


def estimate_batches(
    recipe: Recipe, profile: Profile, image_positions: int, workers: int, tokenizer_folder: Path | None = None
) -> BatchEstimate:
    """Estimate a recipe's rows from its first conversations.

    Where its data or its tokenizer cannot be had, every row is as long as it may be, supervised throughout.

    Args:
        image_positions: LM positions that an image takes.
        workers: over how many a step's conversations are shared.
        tokenizer_folder: instead of the profile's; no tokenizer is looked for elsewhere if it holds none.

    Raises:
        ConversationError: one of the conversations cannot be rendered, which would end the training too.
    """
    try:
        return _from_sample(recipe, profile, image_positions, workers, tokenizer_folder)
    except (WeightsError, DataError) as error:
        return _bound(recipe, profile, workers, error)


def longest_row(recipe: Recipe, profile: Profile) -> int:
    """Positions that a row may have at most."""
    return min(profile.language.context_length, recipe.batching.pack_tokens or sys.maxsize)


def _from_sample(
    recipe: Recipe, profile: Profile, image_positions: int, workers: int, tokenizer_folder: Path | None
) -> BatchEstimate:
    from mmllm_core.data.batching import micro_batches
    from mmllm_core.data.sampling import worker_samples
    from mmllm_core.language import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder or resolve(profile.language.source, weights=False))
    steps = worker_samples(
        recipe.data, recipe.batching, batch_size=recipe.batch_size, seed=recipe.seed, rank=0, world=workers
    )
    shares: list[list[Encoded]] = []
    while sum(map(len, shares)) < SAMPLED:
        shares.append([_encode(sample, recipe, profile, image_positions, tokenizer) for sample in next(steps)])
    encoded = [conversation for share in shares for conversation in share]
    found = [batch for share in shares for batch in micro_batches(share, recipe.batching, recipe.micro_batch)]
    rows = sum(len(batch.input_ids) for batch in found)
    images = [0 if batch.features is None else len(batch.features) for batch in found]
    return BatchEstimate(
        longest=max(batch.input_ids.shape[1] for batch in found),
        rows_per_step=rows / len(shares),
        mean=sum(c.n_tokens for c in encoded) / rows,
        mean_conversation=sum(c.n_tokens for c in encoded) / len(encoded),
        n_supervised=max(batch.n_supervised / len(batch.input_ids) for batch in found),
        mean_supervised=sum(batch.n_supervised for batch in found) / rows,
        n_images=max(n / len(batch.input_ids) for n, batch in zip(images, found, strict=True)),
        mean_images=sum(images) / rows,
        lengths=tuple(batch.input_ids.shape[1] for batch in found),
        source=f"{len(encoded)} of the recipe's conversations, rendered",
    )


def _encode(sample: Sample, recipe: Recipe, profile: Profile, image_positions: int, tokenizer: Any) -> Encoded:
    from mmllm_core.conversation import render

    try:
        rendered = render(
            sample.messages,
            tokenizer,
            n_image_tokens=image_positions,
            max_length=longest_row(recipe, profile),
            generation_prompt=False,
        )
    except ConversationError as error:
        raise ConversationError(f"sample '{sample.id}': {error}") from error
    return Encoded(rendered, (_NO_FEATURES,) * rendered.n_images, sample.id)


def _bound(recipe: Recipe, profile: Profile, workers: int, reason: MmllmError) -> BatchEstimate:
    length = longest_row(recipe, profile)
    why = ":".join(str(reason).split(":")[:2])  # what, and what is wrong with it; not what a library adds
    return BatchEstimate(
        longest=length,
        rows_per_step=recipe.batch_size / workers,
        mean=length,
        mean_conversation=length,
        n_supervised=length,
        mean_supervised=length,
        n_images=float(recipe.needs_images),
        mean_images=float(recipe.needs_images),
        lengths=(length,),
        source=f"a bound: every row as long as it may be, all of it supervised ({why})",
    )
