"""CLIP's text tower: texts -> vectors in the space that CLIP shares with images (`ClipEncoder.embed_pixels`).

In: texts, each short enough for the tower's context. Out: float32 (n_texts, d_embedding), each of length one. Weights
are read from open_clip's folder layout. Does not know images; answers never need it, so it is loaded when it is asked
for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmllm_core.errors import BadInput, WeightsError
from mmllm_core.vision import CLIP_CONFIG, CLIP_WEIGHTS, read_clip_config

_PARTS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
_PREFIX = "text."
"""Of the tower's keys in newer checkpoints; older ones have them without it."""
_CHARS_A_TOKEN = 16
"""More than words have. What is longer is refused before its tokens are counted, which takes quadratic time."""
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_REMEMBERED_WORDS = 50_000
"""Of the tokenizer, which would remember every word that anybody ever sent."""


def has_text_tower(weights: Path) -> bool:
    """Whether a folder in open_clip's layout holds a text tower that belongs to its vision tower and needs no hub.

    Raises:
        WeightsError: the folder cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    from mmllm_core.vision_tower import TEXT_TOWER_IS_STALE

    text_cfg = read_clip_config(weights)["model_cfg"].get("text_cfg")
    if not text_cfg or text_cfg.get("hf_model_name") or text_cfg.get("hf_tokenizer_name"):
        return False
    try:
        with safe_open(weights / CLIP_WEIGHTS, framework="pt") as stored:
            stale = TEXT_TOWER_IS_STALE.items() <= (stored.metadata() or {}).items()
            return not stale and any(_own_name(key) == "text_projection" for key in stored.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{weights / CLIP_WEIGHTS}: cannot be read as safetensors: {error}") from error


class ClipTextEncoder:
    """A CLIP model's tokenizer and text tower, as open_clip builds them.

    Args:
        weights: folder in open_clip's layout that `has_text_tower`.

    Raises:
        WeightsError: the weights do not fit the architecture that the config names.
    """

    def __init__(self, weights: Path, device: str = "cpu"):
        import open_clip
        from open_clip.model import _build_text_tower
        from safetensors.torch import load_file

        model_cfg = read_clip_config(weights)["model_cfg"]
        self._device = device
        self._tower = _build_text_tower(
            model_cfg["embed_dim"], model_cfg["text_cfg"], model_cfg.get("quick_gelu", False)
        )
        self.context_length = int(self._tower.context_length)
        """Tokens that the tower reads, the two at the ends included."""
        self._tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)
        stored = load_file(weights / CLIP_WEIGHTS)
        state = {name: tensor for key, tensor in stored.items() if (name := _own_name(key)) is not None}
        try:
            if model_cfg["text_cfg"].get("vocab_size", self._tokenizer.vocab_size) != self._tokenizer.vocab_size:
                raise ValueError(f"its vocabulary is not the {self._tokenizer.vocab_size} tokens of CLIP's tokenizer")
            self._tower.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise WeightsError(
                f"{weights / CLIP_WEIGHTS}: the text tower does not fit {CLIP_CONFIG}: {error}"
            ) from error
        self._tower = self._tower.float().eval().requires_grad_(False).to(device)

    def tokens(self, text: str, param: str | None = None) -> list[int]:
        """A text's token ids, the two at the ends included: at most `context_length`.

        Args:
            param: the request field that the text came from, for the error.

        Raises:
            BadInput: the text says nothing or is too long.
        """
        most = self.context_length - 2
        found = [] if len(text) > _CHARS_A_TOKEN * most else self._tokenizer.encode(text)
        if len(self._tokenizer.cache) > _REMEMBERED_WORDS:
            self._tokenizer.cache = {special: special for special in _SPECIAL}
        if not text.strip():
            raise BadInput("the text is empty: say something", param)
        if not 0 < len(found) <= most:
            raise BadInput(f"the text is longer than the {most} tokens that CLIP reads: shorten it", param)
        return [self._tokenizer.sot_token_id, *found, self._tokenizer.eot_token_id]

    def embed(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """What texts mean, by their `tokens`.

        Returns:
            float32 (n_texts, d_embedding), each of length one.
        """
        import torch

        ids = torch.zeros(len(tokens), self.context_length, dtype=torch.int64)  # (b, context_length)
        for row, given in zip(ids, tokens, strict=True):
            row[: len(given)] = torch.tensor(given)
        with torch.inference_mode():
            found: Any = self._tower(ids.to(self._device))  # (b, d_embedding)
            return torch.nn.functional.normalize(found.float(), dim=-1).cpu().numpy()


def _own_name(key: str) -> str | None:
    """A key of open_clip's layout as the text tower calls it, or None if it is of another part."""
    name = key.removeprefix(_PREFIX)
    return name if name.startswith(_PARTS) else None
