"""What the LM is asked, in a module of its own: the HTTP side sends it and should not have to load torch for that."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmllm_core.conversation import Message
from mmllm_core.engine.protocol import SamplingParams


@dataclass(frozen=True)
class Prompt:
    """What the LM is asked."""

    id: str
    messages: tuple[Message, ...]
    features: NDArray[np.float16] | None  # (n_images, n_patches, d_vision), in order of appearance
    sampling: SamplingParams
    seconds: float | None = None
    """Until its time is up; clocks differ between machines."""
    traceparent: str = ""
    """Below which the answer is traced."""
