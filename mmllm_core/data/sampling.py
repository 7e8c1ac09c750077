"""Which conversations each worker takes in each optimizer step.

In: the one stream of training samples, a batch size and this worker's rank. Out: for every step, this worker's samples.
The samples of step s are the same however many workers share them, so a run that goes on with another number of workers
goes on with the same data, and no sample is taken twice or left out. Does not know tokens, features or micro-batches.
"""

import random
from collections.abc import Iterator
from itertools import count, islice

from mmllm_core.config import BatchingConfig, DataConfig
from mmllm_core.conversation import TextPart
from mmllm_core.data.mixture import training_samples
from mmllm_core.data.sample import Sample


def worker_samples(
    data: DataConfig,
    batching: BatchingConfig,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
) -> Iterator[list[Sample]]:
    """This worker's samples of each step from `start_step` on, without end.

    Args:
        batch_size: samples of a step over all workers; shares differ by one where it does not divide.

    Raises:
        DataError, WeightsError: as `training_samples`.
    """
    if batching.grouping == "none":
        shares = (len(range(rank, batch_size, world)) for _ in count())
        wanted = (step * batch_size + i for step in count(start_step) for i in range(rank, batch_size, world))
        samples = training_samples(data, seed, wanted)
        yield from (list(islice(samples, share)) for share in shares)
        return
    first = start_step // batching.window
    samples = training_samples(data, seed, count(first * batching.window * batch_size))
    skipped = start_step % batching.window
    for window in count(first):
        drawn = list(islice(samples, batching.window * batch_size))
        steps = grouped(drawn, batching, batch_size, random.Random(f"{seed}-{window}"))
        yield from (step[rank::world] for step in steps[skipped:])
        skipped = 0


def grouped(samples: list[Sample], batching: BatchingConfig, batch_size: int, rng: random.Random) -> list[list[Sample]]:
    """Cut a window of samples into steps whose samples are of like length, in random order.

    Rows of every worker are looked at by each, so lengths are those of the text as it stands: tokens would cost more.
    """
    by_modality = batching.grouping == "modality"
    ordered = sorted(samples, key=lambda sample: (by_modality and bool(sample.images), n_characters(sample)))
    steps = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    rng.shuffle(steps)
    return steps


def n_characters(sample: Sample) -> int:
    """Length of a conversation's text."""
    return sum(len(part.text) for message in sample.messages for part in message.parts if isinstance(part, TextPart))
