"""What the positions of a step's line look at, where each sequence has its own images. Knows cross-attention alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mmllm_core.connectors import Media


class LineMedia:
    """Joins the media of a step's sequences; keys and values are kept while the same sequences follow one another."""

    def __init__(self) -> None:
        self._members: list[Media] = []
        self._joined: Media | None = None

    def of(self, parts: "Sequence[tuple[Media | None, int, int]]") -> "Media | None":
        """Media of a line, or None where no sequence has any.

        Args:
            parts: of each sequence, in the line's order, its media, the first position that it computes and how many.
        """
        members = [media for media, _, _ in parts if media is not None]
        if not members:
            self._members, self._joined = [], None
            return None
        if self._joined is None or list(map(id, members)) != list(map(id, self._members)):
            self._members = members
            embeddings = torch.cat([media.embeddings for media in members])  # (n_images, m, d_model)
            self._joined = replace(members[0], embeddings=embeddings, keys_values={})
        first, looks = 0, []
        for media, begin, n in parts:
            if media is None:
                looks.append(torch.full((n,), -1, device=self._joined.embeddings.device))
                continue
            prompt = media.image_of[0]  # (t,)
            own = prompt[torch.arange(begin, begin + n, device=prompt.device).clamp(max=len(prompt) - 1)]
            looks.append(torch.where(own >= 0, own + first, -1))
            first += len(media.embeddings)
        return replace(self._joined, image_of=torch.cat(looks).unsqueeze(0))  # (1, t)
