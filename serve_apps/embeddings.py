"""What CLIP says of whole images and texts, between the HTTP side and CLIP's replicas: no torch here."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TypedText:
    """A text to embed, and where in the request it stands."""

    text: str
    param: str


@dataclass(frozen=True)
class Embeddings:
    """Vectors of length one in the space that images and texts share.

    Args:
        vectors: float32 (n, d_embedding), in the order of what was asked.
        tokens: tokens of the texts and positions of the images that the towers read.
    """

    vectors: NDArray[np.float32]
    tokens: int
