"""A head start for a connector: put images near the words of their captions, without running the LM.

In: stored features, captions, and the LM's embedding matrix. Out: the connector, moved. An image's embeddings are
regressed onto the sum of its caption's word embeddings, centred over all captions: what captions share is damped
and what tells them apart is kept. It costs seconds where an alignment stage through a frozen LM costs minutes,
and the LM reads such an image much as it would read the caption.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.connectors import Connector


def align_to_words(
    connector: "Connector",
    features: Tensor,
    captions: Sequence[str],
    embeddings: Tensor,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 64,
    seed: int = 0,
) -> float:
    """Train the connector in place by mean squared error.

    Args:
        features: (n, n_patches, d_vision).
        captions: n texts.
        embeddings: the LM's (vocab, d_model) embedding matrix.

    Returns:
        The last batch's error in units of the embeddings' variance.
    """
    distinct = sorted(set(captions))
    targets = caption_targets(distinct, embeddings, tokenizer)  # (c, d_model)
    row_of = torch.tensor([distinct.index(caption) for caption in captions])
    variance = embeddings.float().var()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(connector.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    error = torch.zeros(())
    for _ in range(steps):
        rows = torch.randint(len(captions), (batch_size,), generator=generator)
        projected = connector(features[rows]).float()  # (b, m, d_model)
        error = (projected - targets[row_of[rows]].unsqueeze(1)).square().mean() / variance
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        schedule.step()
    return float(error.detach())


def caption_targets(captions: Sequence[str], embeddings: Tensor, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Where each caption's image should lie.

    Returns:
        float32 (len(captions), d_model).
    """
    ids = [tokenizer(f" {caption}", add_special_tokens=False).input_ids for caption in captions]
    sums = torch.stack([embeddings[row].float().sum(0) for row in ids])  # (c, d_model)
    shared = sums.mean(0)
    return sums - shared + shared / (sum(map(len, ids)) / len(ids))
