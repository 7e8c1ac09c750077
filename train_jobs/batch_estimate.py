"""How many positions a recipe's batches hold: by rendering some conversations, or, where that cannot be, by a bound.

In: a recipe and its profile. Out: a `BatchEstimate` for each micro-batch asked for. Does not know features: an image is
counted by its positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mmllm_core.config import BatchingConfig, Profile, Recipe
from mmllm_core.data.batching import Encoded
from mmllm_core.data.sample import Sample
from mmllm_core.errors import ConversationError, DataError, MmllmError, WeightsError
from mmllm_core.models.resolve import resolve
from train_jobs.training_data import longest_row

SAMPLED = 64
"""Conversations that are rendered, at least."""
_NO_FEATURES = np.zeros((1, 1), np.float16)  # (n, d_vision)
"""Stands for an image, whose features are not wanted."""


@dataclass(frozen=True)
class BatchEstimate:
    """Of a worker's batches, by row: a conversation, or as many as `pack_tokens` hold.

    What all conversations of a batch begin with is counted once.
    """

    longest: int
    """Positions of a row in the batch that has most of them."""
    rows_per_step: float
    """Of a worker, over all micro-batches of a step."""
    mean: float
    """Positions of a row."""
    mean_conversation: float
    """Positions of a conversation, what it shares included."""
    queries: float
    """Of attention, for each position: short conversations are filled up."""
    keys: float
    """Likewise, and what is shared is read with every conversation."""
    n_supervised: float
    """Supervised positions of a row in the batch that has most of them."""
    mean_supervised: float
    n_images: float
    """Images of a row in the batch that has most of them."""
    mean_images: float
    lengths: tuple[int, ...]
    """Positions of a row of each batch."""
    source: str
    """Where the numbers come from, for a person."""


def batch_estimator(
    recipe: Recipe, profile: Profile, image_positions: int, workers: int, tokenizer_folder: Path | None = None
) -> Callable[[int], BatchEstimate]:
    """What a recipe's batches are like at a micro-batch, by its first conversations, which are rendered once.

    Where its data or its tokenizer cannot be had, every row is as long as it may be, supervised throughout.

    Args:
        image_positions: LM positions that an image takes.
        workers: over how many a step's conversations are shared.
        tokenizer_folder: instead of the profile's; no tokenizer is looked for elsewhere if it holds none.

    Raises:
        ConversationError: one of the conversations cannot be rendered, which would end the training too.
    """
    try:
        shares = _render_steps(recipe, profile, image_positions, workers, tokenizer_folder)
    except (WeightsError, DataError) as error:
        bound = _bound(recipe, profile, workers, error)
        return lambda micro_batch: bound
    return cache(partial(_measure, recipe.batching, shares))


def _render_steps(
    recipe: Recipe, profile: Profile, image_positions: int, workers: int, tokenizer_folder: Path | None
) -> list[list[Encoded]]:
    """A worker's share of each of the first steps."""
    from mmllm_core.data.sampling import worker_samples
    from mmllm_core.language import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder or resolve(profile.language.source, weights=False))
    steps = worker_samples(
        recipe.data, recipe.batching, batch_size=recipe.batch_size, seed=recipe.seed, rank=0, world=workers
    )
    shares: list[list[Encoded]] = []
    while sum(map(len, shares)) < SAMPLED:
        shares.append([_encode(sample, recipe, profile, image_positions, tokenizer) for sample in next(steps)])
    return shares


def _measure(batching: BatchingConfig, shares: list[list[Encoded]], micro_batch: int) -> BatchEstimate:
    from mmllm_core.data.batching import fill_rows, micro_batches

    encoded = [conversation for share in shares for conversation in share]
    found = [batch for share in shares for batch in micro_batches(share, batching, micro_batch)]
    packings = [batch.packing for batch in found if batch.packing is not None]
    n_rows = []  # of each batch
    for share in shares:
        left = len(fill_rows(share, batching))
        n_rows += [min(micro_batch, left - at) for at in range(0, left, micro_batch)]
    rows = sum(n_rows)
    lengths = tuple(math.ceil(batch.n_tokens / n) for batch, n in zip(found, n_rows, strict=True))
    positions = sum(batch.n_tokens for batch in found)
    return BatchEstimate(
        longest=max(lengths),
        rows_per_step=rows / len(shares),
        mean=positions / rows,
        mean_conversation=sum(c.n_tokens for c in encoded) / len(encoded),
        queries=sum(packing.n_queries for packing in packings) / positions,
        keys=sum(packing.n_keys for packing in packings) / positions,
        n_supervised=max(batch.n_supervised / n for batch, n in zip(found, n_rows, strict=True)),
        mean_supervised=sum(batch.n_supervised for batch in found) / rows,
        n_images=max(batch.n_images / n for batch, n in zip(found, n_rows, strict=True)),
        mean_images=sum(batch.n_images for batch in found) / rows,
        lengths=lengths,
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
        queries=1.0,
        keys=1.0,
        n_supervised=length,
        mean_supervised=length,
        n_images=float(recipe.needs_images),
        mean_images=float(recipe.needs_images),
        lengths=(length,),
        source=f"a bound: every row as long as it may be, all of it supervised ({why})",
    )
