"""Greedy decoding of many prompts about few images: what prompts have in common is computed once.

In: prompts that each show one image and begin alike, and the images' features. Out: the tokens that
`MultimodalLM.generate` would give for each prompt. A prompt is three pieces: the lead before the image, equal for all;
the image; the tail after it. The LM reads the lead once, each image once, and each tail, and keeps keys and values of
every piece for what follows. Rows that have ended leave the batch. Does not know questions or files.

Answers are a token or two, so that reading prompts is nearly all of the work, and of a prompt of easy-VQA's only the
third that is its question is its own.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmllm_core.conversation import IMAGE_TOKEN_ID

if TYPE_CHECKING:
    from mmllm_core.connectors import Media
    from mmllm_core.model import MultimodalLM


@dataclass(frozen=True)
class Prompt:
    """Token ids with one run of `IMAGE_TOKEN_ID`, and which of the features stand there."""

    input_ids: Sequence[int]
    image: int

    @property
    def pieces(self) -> tuple[list[int], list[int], list[int]]:
        """Lead, image and tail."""
        ids = list(self.input_ids)
        start = ids.index(IMAGE_TOKEN_ID)
        end = start + ids.count(IMAGE_TOKEN_ID)
        return ids[:start], ids[start:end], ids[end:]


@torch.inference_mode()
def generate_about_images(
    model: "MultimodalLM",
    prompts: Sequence[Prompt],
    features: Sequence[NDArray[np.float16]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    max_positions: int = 4096,
) -> list[list[int]]:
    """Decode each prompt greedily.

    Args:
        features: (n, d_vision) of each image, all of one shape.
        max_positions: positions whose keys and values are held at once for images, and again for prompts; it bounds
            the size of batches, which hold one row at least.

    Returns:
        New token ids of each prompt, in order, without the one that ended it.

    Raises:
        ValueError: prompts that do not begin alike.
    """
    if not prompts:
        return []
    pieces = [prompt.pieces for prompt in prompts]
    lead, image, _ = pieces[0]
    if any(other[:2] != (lead, image) for other in pieces):
        raise ValueError("prompts must have the same tokens before their image, and as many for it")
    tails = [tail for _, _, tail in pieces]
    new_ids: list[list[int]] = [[] for _ in prompts]
    device = model.causal_lm.device
    model.attend(packed=False)
    read_lead = _read_lead(model, lead)
    shown = sorted({prompt.image for prompt in prompts})
    for images in _slices(shown, max_positions // len(lead + image)):
        row_of = {number: row for row, number in enumerate(images)}
        stacked = torch.from_numpy(np.stack([features[i] for i in images]).astype(np.float32)).to(device)
        read_images, media = _read_images(model, read_lead, len(image), stacked)
        about = sorted((i for i, p in enumerate(prompts) if p.image in row_of), key=lambda i: (len(tails[i]), i))
        longest = len(lead + image) + max(len(tails[i]) for i in about) + max_new_tokens
        for batch in _slices(about, max_positions // longest):  # tails of like length share a batch
            rows = torch.tensor([row_of[prompts[i].image] for i in batch], device=device)  # (b,)
            decoding = _Decoding(model, _rows_of(read_images, rows), media, rows)
            decoded = decoding.run([tails[i] for i in batch], max_new_tokens, stop_ids)
            for i, ids in zip(batch, decoded, strict=True):
                new_ids[i] = ids
    return new_ids


class _Decoding:
    """A batch of tails, read after what is in the cache already, and the tokens that follow them.

    Args:
        cache: keys and values (b, h, t, d_head) of what stands before the tails.
        media: what the LM's layers look at, if anything.
        images: int64 (b,): the row of `media.embeddings` that each row looks at.
    """

    def __init__(self, model: "MultimodalLM", cache: Any, media: "Media | None", images: Tensor):
        self._model = model
        self._cache = cache
        self._media = media
        self._images = images
        self._device = images.device

    def run(self, tails: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """New token ids of each row."""
        length = max(len(tail) for tail in tails)
        n_read = self._cache.get_seq_length()
        ids = torch.zeros(len(tails), length, dtype=torch.int64)  # (b, s), padded on the left
        mask = torch.zeros(len(tails), n_read + length, dtype=torch.int64)  # (b, t + s)
        mask[:, :n_read] = 1
        for row, tail in enumerate(tails):
            ids[row, length - len(tail) :] = torch.tensor(tail)
            mask[row, n_read + length - len(tail) :] = 1
        mask = mask.to(self._device)
        ids = ids.to(self._device)
        position_ids = (mask.cumsum(1) - 1)[:, n_read:]  # (b, s); padding repeats a position and is never looked at
        new_ids: list[list[int]] = [[] for _ in tails]
        going = list(range(len(tails)))
        for step in range(max_new_tokens):
            chosen = self._next_tokens(ids, mask, position_ids)  # (b,)
            kept = [i for i, token in enumerate(chosen.tolist()) if token not in stop_ids]
            for i in kept:
                new_ids[going[i]].append(int(chosen[i]))
            if not kept or step + 1 == max_new_tokens:
                break
            if len(kept) < len(going):
                rows = torch.tensor(kept, device=self._device)
                self._cache.batch_select_indices(rows)
                chosen, mask, position_ids = chosen[rows], mask[rows], position_ids[rows]
                self._images = self._images[rows]
                going = [going[i] for i in kept]
            ids = chosen.unsqueeze(1)  # (b, 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position_ids = position_ids[:, -1:] + 1  # (b, 1)
        return new_ids

    def _next_tokens(self, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        media = self._media
        if media is not None:
            media = replace(media, image_of=self._images.unsqueeze(1).expand_as(ids))
        embeddings = self._model.embed(ids, None)  # (b, s, d_model)
        return _forward(self._model, embeddings, self._cache, media, mask, position_ids)[:, -1].argmax(-1)


def _read_lead(model: "MultimodalLM", lead: Sequence[int]) -> Any:
    """The cache of the lead alone, a batch of one row."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.causal_lm.config)
    if lead:  # some templates put nothing before a user's turn
        ids = torch.tensor([lead], device=model.causal_lm.device)
        _forward(model, model.embed(ids, None), cache, None)
    return cache


def _read_images(model: "MultimodalLM", lead: Any, n_positions: int, features: Tensor) -> tuple[Any, "Media | None"]:
    """The cache of lead and image, a row for each of features (n_images, n, d_vision), and what layers look at."""
    ids = torch.full((len(features), n_positions), IMAGE_TOKEN_ID, device=features.device)  # (n_images, m)
    cache = _rows_of(lead, torch.zeros(len(features), dtype=torch.int64, device=features.device))
    media = model.media(ids, features)
    _forward(model, model.embed(ids, features), cache, media)
    return cache, media


def _forward(
    model: "MultimodalLM",
    embeddings: Tensor,
    cache: Any,
    media: "Media | None",
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Logits (b, 1, vocab) after embeddings (b, s, d_model), whose keys and values join the cache."""
    with model.showing(media):
        logits: Tensor = model.causal_lm(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache of the given rows, each perhaps several times; the original is left as it is.

    Growing a dynamic cache makes new tensors and never writes into old ones, so that shallow copies suffice.
    """
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _slices(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    size = max(1, size)
    return (items[start : start + size] for start in range(0, len(items), size))
