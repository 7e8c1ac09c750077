"""The languages that Whisper knows, by code and by name."""

from functools import cache

from mmllm_core.errors import BadInput

UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})
"""Languages that are written without spaces between words."""


def language_code(given: str, *, multilingual: bool, param: str | None = "language") -> str:
    """The code of a language that is given by code or name.

    Args:
        multilingual: whether the weights know more than English.
        param: the request field that it came from, for the error.

    Raises:
        BadInput: no such language, or not one of these weights.
    """
    names = _names()
    code = given.strip().lower()
    code = code if code in names else {name: code for code, name in names.items()}.get(code, "")
    if not code:
        raise BadInput("the language is unknown: give an ISO 639-1 code such as 'en', or leave it out", param)
    if code != "en" and not multilingual:
        raise BadInput("the Whisper model that is served hears English only: give 'en', or leave it out", param)
    return code


def language_name(code: str) -> str:
    """A language's name in English, in lower case."""
    return _names().get(code, code)


@cache
def _names() -> dict[str, str]:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return dict(LANGUAGES)
