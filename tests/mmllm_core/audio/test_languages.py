"""Languages of weights: multilingual ones that are older do not hear Cantonese."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models

from mmllm_core.audio import SAMPLE_RATE, SpeechTask, Transcriber, openai_whisper_engine
from mmllm_core.audio.faster_whisper_engine import languages_of
from mmllm_core.audio.languages import ENGLISH, known_codes, language_code, language_name
from mmllm_core.errors import BadInput, ConfigError
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve


def test_languages_have_codes_and_names() -> None:
    assert language_code(" English ", known=ENGLISH) == "en"
    assert language_code("Cantonese", known=frozenset(known_codes())) == "yue"
    assert language_name("de") == "german"


def test_a_tokenizer_has_tokens_of_its_languages() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens([AddedToken(f"<|{code}|>") for code in known_codes()[:99]])
    languages = languages_of(tokenizer)
    assert languages == frozenset(known_codes()) - {"yue"}
    with pytest.raises(BadInput, match="does not hear cantonese"):
        language_code("cantonese", known=languages)


def random_whisper(monkeypatch: pytest.MonkeyPatch, n_vocab: int, language: str | None = None) -> Transcriber:
    """openai-whisper of random weights with that many tokens."""
    model = pytest.importorskip("whisper.model")
    dims = {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 1}
    dims |= {"n_vocab": n_vocab, "n_text_ctx": 448, "n_text_state": 16, "n_text_head": 2, "n_text_layer": 1}
    made: Any = model.Whisper(model.ModelDimensions(**dims)).eval()
    monkeypatch.setattr(openai_whisper_engine, "load_openai_whisper", lambda weights, device: made)
    audio = load_profile("embedded").audio
    changes = {"engine": "openai-whisper", "compute_type": "float32", "language": language}
    return Transcriber(audio.model_validate(audio.model_dump() | changes), Path("none"))


@pytest.mark.parametrize("given", ["yue", "Cantonese"])
def test_cantonese_is_refused_by_weights_of_99_languages(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    silence = np.zeros(SAMPLE_RATE, dtype=np.float32)
    task = SpeechTask(given)
    assert random_whisper(monkeypatch, 51866).begin(silence, task).language == "yue"
    older = random_whisper(monkeypatch, 51865)
    assert older.begin(silence, SpeechTask("su")).language == "su"
    with pytest.raises(BadInput, match="does not hear cantonese") as caught:
        older.begin(silence, task)
    assert caught.value.param == "language"


def test_languages_are_in_the_order_of_their_tokens() -> None:
    tokenizer = pytest.importorskip("whisper.tokenizer")
    assert known_codes() == tuple(tokenizer.LANGUAGES)


def test_the_language_of_a_config_is_a_name_or_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    silence = np.zeros(SAMPLE_RATE, dtype=np.float32)
    assert random_whisper(monkeypatch, 51865, "German").begin(silence).language == "de"
    for language in ("yue", "klingon"):
        with pytest.raises(ConfigError, match=f"audio.language '{language}'"):
            random_whisper(monkeypatch, 51865, language)


def test_a_config_does_not_ask_english_weights_for_german() -> None:
    audio = load_profile("embedded").audio
    german = audio.model_validate(audio.model_dump() | {"language": "de"})
    with pytest.raises(ConfigError, match="hears English only"):
        Transcriber(german, resolve(audio.source), threads=1)
