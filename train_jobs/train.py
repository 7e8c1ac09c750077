"""The one training job: Ray Train starts the workers, DeepSpeed ZeRO shares the optimizer, the recipe names the stage.

In: a `Recipe` and stored CLIP features. Out: a bundle, and beside it a metrics log, a loss plot and accuracy before
and after. Each worker takes its own share of one reproducible stream of conversations.

Run it as `mmllm train embedded-instruct` or `ray job submit -- python -m train_jobs.train embedded-instruct`.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmllm_core.bundle import Bundle, BundleInfo, bundles_folder, save_bundle
from mmllm_core.config import Profile, Recipe, parse_overrides
from mmllm_core.connectors import LmShape
from mmllm_core.data import easy_vqa
from mmllm_core.data.mixture import data_hashes, image_paths, training_samples
from mmllm_core.errors import BundleError, TrainingError
from mmllm_core.evaluation.accuracy import Scores, scores_from_json
from mmllm_core.evaluation.plots import plot_accuracy, plot_loss
from mmllm_core.language import load_tokenizer
from mmllm_core.models.home import features_folder, home
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from mmllm_core.vision import ClipEncoder
from train_jobs.deepspeed_ops import build_ops, worker_environment
from train_jobs.launch import has_gpus, run_workers
from train_jobs.progress import following, read_metrics
from train_jobs.recipe import load_training_recipe
from train_jobs.stored_features import StoredFeatures
from train_jobs.train_loop import LoopConfig, load_trained, train_loop


def runs_folder() -> Path:
    """Where runs leave their logs and plots."""
    return home() / "runs"


@dataclass(frozen=True)
class TrainedRun:
    """What a run left behind."""

    bundle: Bundle
    folder: Path
    before: Scores
    after: Scores
    baseline: Scores


def train(recipe: Recipe) -> TrainedRun:
    """Train one stage, or reuse the bundle that equal recipe, profile, features and data made before.

    Raises:
        TrainingError: a worker failed; the message is the cause's own.
        EnvironmentLack: no compiler, no space, too few CPUs.
        WeightsError: weights that the profile names cannot be had.
        DataError: a file that the recipe names cannot be learned from.
    """
    profile = load_profile(recipe.profile)
    folder = runs_folder() / recipe.name
    vision_weights = resolve(profile.vision.source)
    encoder = ClipEncoder(profile.vision, vision_weights)
    hashes = data_hashes(recipe.data)
    if (finished := _finished_run(recipe, profile, encoder.fingerprint, hashes)) is not None:
        return finished
    language_weights = resolve(profile.language.source)
    if recipe.evaluation_questions or recipe.word_alignment_steps:
        easy_vqa.fetch()
    next(training_samples(recipe.data, recipe.seed))  # files are checked and converted before any worker starts
    features = StoredFeatures(features_folder(), encoder.fingerprint, profile.vision.max_pixels)
    if (lacking := features.known_lack(image_paths(recipe.data))) is not None:
        features(lacking)  # says what is wrong with it
    gpu = has_gpus(recipe.workers)
    if not gpu:
        build_ops()
    log = folder / "metrics.jsonl"
    log.unlink(missing_ok=True)
    loop = LoopConfig(
        recipe=recipe.model_dump(mode="json"),
        profile=profile.model_dump(mode="json"),
        language_weights=str(language_weights),
        features=features_folder(),
        fingerprint=encoder.fingerprint,
        d_vision=encoder.d_vision,
        n_patches=encoder.n_patches,
        log=str(log),
        environment=worker_environment(gpu),
    )
    with following(log, recipe.steps, f"training {recipe.name}"):
        result = run_workers(train_loop, asdict(loop), workers=recipe.workers, name=recipe.name, storage=home() / "ray")
    if result.checkpoint is None:
        raise TrainingError(f"{recipe.name}: the run ended without a checkpoint")
    with result.checkpoint.as_directory() as checkpoint:
        connector, adapter = load_trained(
            Path(checkpoint), profile.connector, encoder.d_vision, LmShape.read(language_weights)
        )
        info = BundleInfo(
            name=recipe.name,
            profile=profile,
            d_vision=encoder.d_vision,
            n_patches=encoder.n_patches,
            feature_fingerprint=encoder.fingerprint,
            recipe=recipe.model_dump(mode="json"),
            data=hashes,
            metrics=result.metrics,
        )
        bundle = save_bundle(
            info, connector, load_tokenizer(language_weights), adapter=adapter, vision_weights=vision_weights
        )
    run = _read_run(bundle)
    plot_loss(read_metrics(log), folder / "loss.png", f"{recipe.name}: training loss")
    if run.after:
        scores = {"always the commonest": run.baseline, "before tuning": run.before, "after tuning": run.after}
        plot_accuracy(scores, folder / "accuracy.png", f"{recipe.name}: held-out easy-VQA test questions")
    return run


def _finished_run(recipe: Recipe, profile: Profile, fingerprint: str, hashes: dict[str, str]) -> TrainedRun | None:
    try:
        bundle = Bundle.open(bundles_folder() / recipe.name)
    except BundleError:
        return None
    info = bundle.info
    made_from = (info.recipe, _comparable(info.profile), info.feature_fingerprint, info.data)
    same = made_from == (recipe.model_dump(mode="json"), _comparable(profile), fingerprint, hashes)
    return _read_run(bundle) if same else None


def _comparable(profile: Profile) -> dict[str, Any]:
    """A profile but for where its CLIP lies: a bundle carries that, and the fingerprint tells it apart."""
    return profile.model_dump(mode="json", exclude={"vision": {"source"}})


def _read_run(bundle: Bundle) -> TrainedRun:
    folder = runs_folder() / bundle.info.name
    scores = bundle.info.metrics.get("accuracy", {})
    return TrainedRun(bundle, folder, *(scores_from_json(scores.get(k, {})) for k in ("before", "after", "baseline")))


def main() -> None:
    """Entry point of `python -m train_jobs.train RECIPE [key=value ...]`."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m train_jobs.train RECIPE [key=value ...]")
    print(train(load_training_recipe(sys.argv[1], parse_overrides(sys.argv[2:]))).bundle.folder)


if __name__ == "__main__":
    main()
