"""Word error rate: how much of what was said was heard otherwise.

In: texts as they were said and as they were heard. Out: counts of wrong words, and which words were taken for which.
Texts are compared after Whisper's normalisation of English (Radford et al. 2022, appendix C): case, punctuation,
spelling variants and the way to write a number do not count. Does not know sound.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from mmllm_core.config import PackageSource
from mmllm_core.models.packages import fetch_package

SPELLINGS = PackageSource(
    requirement="whisper-normalizer==0.1.15",
    sha256="2871b3c56557628dc30749bf3ffac7bc4ac3d3f497b0b24df27d0c4c434e113f",
    folder="whisper_normalizer/normalizers",
)
"""Carries Whisper's own table of British and American spellings, byte for byte; transformers has the code alone."""


@dataclass(frozen=True)
class WordErrors:
    """Errors among the words that were said; they add up over disjoint sets of texts."""

    substitutions: int
    deletions: int
    insertions: int
    words: int
    """That were said."""

    @property
    def errors(self) -> int:
        """Words taken for others, not heard, or heard though nobody said them."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors a word said. Above 1 where more was heard than said; 0 when nothing was said or heard."""
        return self.errors / self.words if self.words else float(self.errors > 0)


Mishearings = Counter[tuple[str, str]]
"""How often words were heard as others: (said, heard), either of which may be empty."""


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> WordErrors:
    """Count the errors of a minimal alignment (Levenshtein's, by jiwer) of what was said and what was heard.

    Args:
        references: what was said.
        hypotheses: what was heard of each.

    Raises:
        ValueError: the two differ in length.
        WeightsError: the table of spellings cannot be fetched.
    """
    if not references and not hypotheses:
        return WordErrors(0, 0, 0, 0)
    found = _align(references, hypotheses)
    words = found.hits + found.substitutions + found.deletions
    return WordErrors(found.substitutions, found.deletions, found.insertions, words)


def mishearings(references: Sequence[str], hypotheses: Sequence[str]) -> Mishearings:
    """Count which words were heard as which; neighbouring errors are one mishearing.

    Args and errors as for `word_error_rate`.
    """
    counts: Mishearings = Counter()
    if references or hypotheses:
        found = _align(references, hypotheses)
        for said, heard, chunks in zip(found.references, found.hypotheses, found.alignments, strict=True):
            counts.update(_differences(said, heard, chunks))
    return counts


def heard_rightly(reference: str, hypothesis: str) -> bool:
    """Whether no word differs."""
    return normalise_english(reference) == normalise_english(hypothesis)


def normalise_english(text: str) -> str:
    """Whisper's normalisation of English: lower case, no punctuation, American spelling, numbers in digits.

    Raises:
        WeightsError: the table of spellings cannot be fetched.
    """
    return str(_normaliser()(text))


def _align(references: Sequence[str], hypotheses: Sequence[str]) -> Any:
    import jiwer

    return jiwer.process_words([normalise_english(t) for t in references], [normalise_english(t) for t in hypotheses])


def _differences(said: Sequence[str], heard: Sequence[str], chunks: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """What differs between two equal stretches."""
    missed: list[str] = []
    taken: list[str] = []
    for chunk in chunks:
        if chunk.type != "equal":
            missed += said[chunk.ref_start_idx : chunk.ref_end_idx]
            taken += heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        elif missed or taken:
            yield " ".join(missed), " ".join(taken)
            missed, taken = [], []
    if missed or taken:
        yield " ".join(missed), " ".join(taken)


@cache
def _normaliser() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    table = fetch_package(SPELLINGS) / "english.json"
    return EnglishTextNormalizer(json.loads(table.read_text(encoding="utf-8")))
