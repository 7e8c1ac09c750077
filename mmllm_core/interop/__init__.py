"""From and to other projects' checkpoint formats."""

from typing import Literal

ExportFormat = Literal["llava-hf", "merged-lm", "merged-bundle"]
"""A LLaVA checkpoint, the LM alone, or a bundle that carries the merged LM."""
