"""The head start of a run: every worker puts images near their captions' words, all in the same way.

In: a model that was not trained yet. Out: its connector, moved (`mmllm_core.word_alignment`). Knows easy-VQA's
captions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmllm_core.config import Recipe
from mmllm_core.data import easy_vqa

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.model import MultimodalLM


def align_connector(
    model: "MultimodalLM",
    tokenizer: "PreTrainedTokenizerBase",
    recipe: Recipe,
    features: Callable[[Path], NDArray[np.float16]],
    device: str,
) -> None:
    """Train the connector for `recipe.word_alignment_steps`, in float32: bf16 would round small updates away."""
    import torch

    from mmllm_core.word_alignment import align_to_words

    captioned = [(image.image, image.caption) for image in easy_vqa.load_split(easy_vqa.fetch(), "train")]
    found = [(features(path), caption) for path, caption in captioned if caption]
    dtype = model.connector.dtype
    align_to_words(
        model.connector.float(),
        torch.from_numpy(np.stack([feature for feature, _ in found])).to(device),
        [caption for _, caption in found],
        model.causal_lm.get_input_embeddings().weight.detach(),
        tokenizer,
        steps=recipe.word_alignment_steps,
        learning_rate=recipe.word_alignment_learning_rate,
        seed=recipe.seed,
    )
    model.connector.to(dtype)
