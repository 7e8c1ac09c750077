"""Speak held-out questions to a bundle, batched across Ray workers, and ask it the same in writing.

In: a bundle. Out: a `SpokenReport`. Each worker speaks a question, hears it with the bundle's Whisper as serving does
(decoding of the file's bytes included), and answers it in every form. Features of the test images come from the store
where they are there.

Run it as `mmllm evaluate-spoken` or `ray job submit -- python -m train_jobs.evaluate_spoken`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from mmllm_core.audio import Transcriber, decode_audio
from mmllm_core.bundle import Bundle
from mmllm_core.data import easy_vqa
from mmllm_core.evaluation.accuracy import OVERALL
from mmllm_core.evaluation.speech_synthesis import SpeakerName, build_speaker, require_speaker
from mmllm_core.evaluation.spoken import Hearing, SpokenReport, answer_hearings
from mmllm_core.models.home import features_folder
from train_jobs.bundle_images import BundleImages
from train_jobs.launch import has_gpus, prepare_ray_data, readable_errors
from train_jobs.progress import progress_bar

_ANSWERS = ("heard", "typed", "recognised", "spoken")


@dataclass(frozen=True)
class SpokenOptions:
    """Which questions are spoken, and by whom."""

    limit: int | None = 300
    """Questions of easy-VQA's test split, drawn at random; None for all 9,673."""
    speaker: SpeakerName = SpeakerName.PIPER
    workers: int = 2
    """Processes, one CPU (or GPU, where Ray has some) each."""
    seed: int = 0
    """Of the questions, and of how each is spoken."""


def evaluate_spoken(bundle: Bundle, options: SpokenOptions = SpokenOptions()) -> SpokenReport:
    """Ask a bundle the same questions typed and spoken.

    Raises:
        EnvironmentLack: the speaker's library is not installed.
        TrainingError: a worker failed, for an image that cannot be read for example.
    """
    require_speaker(options.speaker)
    prepare_ray_data()
    gpus = has_gpus(options.workers)
    questions = easy_vqa.held_out_questions(easy_vqa.fetch(), options.limit, options.seed)
    dataset = ray.data.from_items(
        [{"row": row} for row in range(len(questions))], override_num_blocks=options.workers * 4
    )
    answered = dataset.map_batches(
        _Listener,
        fn_constructor_args=(str(bundle.folder), features_folder(), options, gpus),
        batch_size=32,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
        num_cpus=0 if gpus else 1,
        num_gpus=1 if gpus else 0,
    )
    hearings: dict[int, Hearing] = {}
    with readable_errors("evaluation"), progress_bar() as progress:
        task = progress.add_task("asking aloud", total=len(questions), note="loading")
        for block in answered.iter_batches(batch_size=None):
            for row, *answers in zip(block["row"], *(block[name] for name in _ANSWERS), strict=True):
                hearings[int(row)] = Hearing(questions[int(row)], *(str(answer) for answer in answers))
            progress.update(task, advance=len(block["row"]), note="")
    return SpokenReport(tuple(hearings[row] for row in range(len(questions))))


class _Listener:
    """One worker of the pool: a speaker, Whisper and the model."""

    def __init__(self, bundle: str, features: str, options: SpokenOptions, gpu: bool):
        import ctranslate2

        ctranslate2.set_random_seed(options.seed)  # Whisper samples where its likeliest words make no sense
        opened = Bundle.open(Path(bundle))
        device = "cuda" if gpu else "cpu"
        audio = opened.profile.audio
        self._speaker = build_speaker(options.speaker, options.seed)
        self._transcriber = Transcriber(audio, opened.weights(audio.source), device, threads=1)
        self._max_seconds = audio.max_seconds
        self._model = opened.load_model(device)
        self._tokenizer = opened.tokenizer
        self._features = BundleImages(opened, features, device)
        self._questions = easy_vqa.held_out_questions(easy_vqa.fetch(), options.limit, options.seed)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        questions = [self._questions[int(row)] for row in batch["row"]]
        clips = [self._speaker.speak(question.question, question.id) for question in questions]
        heard = [self._transcriber.transcribe(decode_audio(clip, self._max_seconds)).text for clip in clips]
        hearings = list(answer_hearings(self._model, self._tokenizer, questions, heard, self._features))
        columns = {name: np.array([getattr(hearing, name) for hearing in hearings], dtype=object) for name in _ANSWERS}
        return {"row": batch["row"]} | columns


if __name__ == "__main__":
    report = evaluate_spoken(Bundle.latest())
    print({form: scores[OVERALL].accuracy for form, scores in report.scores.items()}, report.word_errors)
