"""A worker's micro-batches of each step, made while the step before is computed.

In: the recipe's stream of conversations, and where images' arrays come from. Out: for every step, batches on the CPU. A
conversation that cannot be learned from ends the run with an error that names it. Does not know the model or DeepSpeed.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm_core.config import Profile, Recipe
from mmllm_core.conversation import render
from mmllm_core.data.batching import Encoded, micro_batches
from mmllm_core.data.collate import Batch, ImageArray
from mmllm_core.data.sample import Sample
from mmllm_core.data.sampling import worker_samples
from mmllm_core.errors import ConversationError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoding:
    """How conversations become tokens, and their images arrays."""

    tokenizer: "PreTrainedTokenizerBase"
    images: Callable[[Path], ImageArray]
    n_image_tokens: int
    """LM positions that an image takes."""
    max_length: int

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        profile: Profile,
        tokenizer: "PreTrainedTokenizerBase",
        images: Callable[[Path], ImageArray],
        n_patches: int,
    ) -> "Encoding":
        """As recipe and profile say."""
        return cls(tokenizer, images, profile.connector.n_tokens(n_patches), longest_row(recipe, profile))

    def __call__(self, sample: Sample) -> Encoded:
        """Encode a conversation.

        Raises:
            TrainingError: it is too long, or an image of it cannot be had; the message names the sample.
        """
        try:
            rendered = render(
                sample.messages,
                tokenizer=self.tokenizer,
                n_image_tokens=self.n_image_tokens,
                max_length=self.max_length,
                generation_prompt=False,
            )
            return Encoded(rendered, tuple(self.images(image) for image in sample.images), sample.id)
        except ConversationError as error:
            limits = "the profile's language.context_length and the recipe's batching.pack_tokens"
            raise TrainingError(f"sample '{sample.id}': {error}; {limits} set the limit") from error
        except TrainingError as error:
            raise TrainingError(f"sample '{sample.id}': {error}") from error


def longest_row(recipe: Recipe, profile: Profile) -> int:
    """Positions that a row of a batch may have at most: a conversation, or as many as are packed together."""
    return min(profile.language.context_length, recipe.batching.pack_tokens or sys.maxsize)


def step_batches(
    recipe: Recipe, encoding: Encoding, *, rank: int = 0, world: int = 1, start_step: int = 0
) -> Iterator[list[Batch]]:
    """This worker's micro-batches of each step from `start_step` to the recipe's last.

    Raises:
        DataError: a file cannot be read, or a row of it cannot be learned from.
        TrainingError: as `Encoding`.
    """
    samples = worker_samples(
        recipe.data,
        recipe.batching,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        rank=rank,
        world=world,
        start_step=start_step,
    )

    def make() -> list[Batch]:
        return micro_batches([encoding(sample) for sample in next(samples)], recipe.batching, recipe.micro_batch)

    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(make) if start_step < recipe.steps else None
        for step in range(start_step, recipe.steps):
            assert following is not None
            batches = following.result()
            if step + 1 < recipe.steps:
                following = ahead.submit(make)
            yield batches
