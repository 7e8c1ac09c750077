"""The languages that Whisper knows, by code and by name."""

from collections.abc import Set
from functools import cache

from mmllm_core.errors import BadInput

UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})
"""Languages that are written without spaces between words."""


ENGLISH = frozenset({"en"})
"""What weights hear that are not multilingual."""


def language_code(given: str, *, known: Set[str], param: str | None = "language") -> str:
    """The code of a language that is given by code or name.

    Args:
        known: codes of what the weights hear.
        param: the request field that it came from, for the error.

    Raises:
        BadInput: no such language, or not one of these weights.
    """
    names = _names()
    code = given.strip().lower()
    code = code if code in names else {name: code for code, name in names.items()}.get(code, "")
    if not code:
        raise BadInput("the language is unknown: give an ISO 639-1 code such as 'en', or leave it out", param)
    if code not in known:
        hears = "hears English only: give 'en'" if known == ENGLISH else f"does not hear {names[code]}: give another"
        raise BadInput(f"the Whisper model that is served {hears}, or leave it out", param)
    return code


def language_name(code: str) -> str:
    """A language's name in English, in lower case."""
    return _names().get(code, code)


def known_codes() -> tuple[str, ...]:
    """Codes of all languages of any Whisper, in the order of their tokens: older weights have the first 99."""
    return tuple(_names())


@cache
def _names() -> dict[str, str]:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return dict(LANGUAGES)
