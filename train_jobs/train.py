"""The one training job: Ray Train starts the workers, DeepSpeed ZeRO shares the optimizer, the recipe names the stage.

In: a `Recipe`, and stored CLIP features unless they are computed as training goes. Out: a bundle, and in the run's
folder (`train_jobs.run_record`) its log, answers and report. A run that was interrupted goes on from its last
checkpoint when the same recipe is given again, or by its name.

Run it as `mmllm train RECIPE`, on this machine or as `ray job submit -- mmllm train RECIPE`.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm_core.bundle import Bundle, bundles_folder
from mmllm_core.config import Profile, Recipe, check_recipe
from mmllm_core.data import easy_vqa
from mmllm_core.data.mixture import data_hashes, image_paths, training_samples
from mmllm_core.errors import BundleError, TrainingError
from mmllm_core.evaluation.accuracy import (
    Scores,
    commonest_answer_baseline,
    score_by_kind,
    scores_from_json,
    scores_to_json,
)
from mmllm_core.models.home import features_folder, home
from mmllm_core.vision import file_sha256
from train_jobs.held_out import HeldOutQuestions
from train_jobs.launch import (
    Kept,
    Workers,
    gpus_of_each,
    has_checkpoints,
    remove_run,
    run_workers,
)
from train_jobs.origins import Origins, find_origins, starting_profile
from train_jobs.progress import console, following, read_metrics, step_lines
from train_jobs.report import write_report
from train_jobs.run_folders import INPUTS, LOG, resumable_folder, runs_folder
from train_jobs.run_inputs import RunInputs, learns_the_same, read_inputs, write_inputs
from train_jobs.run_record import has_ended, read_run
from train_jobs.stop_notice import clear_notice, read_notice
from train_jobs.stored_features import StoredFeatures
from train_jobs.trackers import open_tracker, require_tracker
from train_jobs.train_loop import LoopConfig, train_loop
from train_jobs.trained_parts import RunOutcome, bundle_of


@dataclass(frozen=True)
class TrainedRun:
    """What a run left behind."""

    bundle: Bundle
    folder: Path
    before: Scores
    after: Scores
    baseline: Scores

    @property
    def report(self) -> Path:
        """Its page."""
        return self.folder / "report.html"


def train(recipe: Recipe, *, discard: bool = False) -> TrainedRun:
    """Train one stage; go on with an equal run that was interrupted, or reuse the bundle of one that ended.

    Args:
        discard: remove what an interrupted run of this name has left, if that was started with something else.

    Raises:
        ConfigError: recipe and profile contradict each other, or the tracker is unknown.
        TrainingError: a worker failed; the message is the cause's own. Or another run of this name was interrupted.
        EnvironmentLack: no compiler, no space, too few CPUs, a tracker that is not installed.
        WeightsError: weights that the profile names cannot be had.
        DataError: a file that the recipe names cannot be learned from.
    """
    inputs, origins = _prepare(recipe)
    return _train(inputs, origins, read_inputs(runs_folder() / recipe.name, _storage(recipe)), discard=discard)


def _prepare(recipe: Recipe) -> tuple[RunInputs, Origins]:
    """Check a recipe, and find what its run starts with."""
    require_tracker(recipe.tracker)
    profile = starting_profile(recipe)
    check_recipe(recipe, profile)
    origins = find_origins(recipe, profile)
    inputs = RunInputs(
        recipe=recipe,
        profile=profile,
        fingerprint=origins.fingerprint,
        data=data_hashes(recipe.data),
        start=file_sha256(origins.bundle / "manifest.json") if origins.bundle else None,
    )
    return inputs, origins


def _train(inputs: RunInputs, origins: Origins, recorded: RunInputs | None, *, discard: bool) -> TrainedRun:
    """Train, go on or reuse.

    Args:
        recorded: what the run of this name was started with, if there is one.
    """
    recipe, profile = inputs.recipe, inputs.profile
    folder, storage = runs_folder() / recipe.name, _storage(recipe)
    equal = recorded is not None and recorded.gives_the_same_as(inputs)
    if equal and (finished := _finished_run(recipe)) is not None:
        return finished
    interrupted = has_checkpoints(storage, recipe.name) and not has_ended(folder)
    goes_on = equal and interrupted
    if interrupted and not (goes_on or discard):
        raise TrainingError(
            f"{recipe.name}: a run of this name was interrupted and left checkpoints in {storage}, and it was started "
            f"with something else: go on with it by 'mmllm train --resume {recipe.name}', train under another name "
            "('name=...'), or give --discard to remove them"
        )
    workers = Workers(recipe.workers, recipe.min_workers, recipe.gpus_per_worker, max_restarts=recipe.max_restarts)
    gpu = gpus_of_each(workers) > 0
    _require_data(recipe, profile, origins)
    if not goes_on:
        shutil.rmtree(folder, ignore_errors=True)
        remove_run(storage, recipe.name)
    write_inputs(folder, inputs, storage)
    clear_notice(folder)
    loop = LoopConfig(
        recipe=recipe.model_dump(mode="json"),
        profile=profile.model_dump(mode="json"),
        origins=origins,
        features=features_folder(),
        folder=folder,
    )
    if goes_on:
        console.print(f"  going on with run '{recipe.name}' from its last checkpoint", highlight=False)
    checkpoint = _run(recipe, loop, workers, resumed=goes_on)
    from mmllm_core.language import compute_dtype  # which brings PyTorch

    with checkpoint.as_directory() as place:
        metrics, dtype = _metrics(recipe, folder), compute_dtype(profile.language.dtype, "cuda" if gpu else "cpu")
        bundle = bundle_of(Path(place), RunOutcome(recipe, profile, origins, inputs.data, metrics, dtype))
    write_report(folder, bundle.info)
    return _read_run(bundle)


def _run(recipe: Recipe, loop: LoopConfig, workers: Workers, *, resumed: bool) -> Any:
    """Run the workers to their end; the last checkpoint."""
    folder, log, storage = loop.folder, loop.folder / LOG, _storage(recipe)
    with (
        open_tracker(recipe.tracker, recipe.name, folder, recipe.model_dump(mode="json"), resumed=resumed) as tracker,
        following(log, recipe.steps, f"training {recipe.name}", tracker),
    ):
        try:
            result = run_workers(
                train_loop,
                vars(loop),
                name=recipe.name,
                workers=workers,
                kept=Kept(storage, recipe.checkpoint.keep, "loss_ema"),
            )
        except TrainingError as error:
            if (said := read_notice(folder)) is not None:
                raise TrainingError(f"{recipe.name}: {said}") from error
            if has_checkpoints(storage, recipe.name):
                way_on = f"go on from the last checkpoint in {storage} with 'mmllm train --resume {recipe.name}'"
                raise TrainingError(f"{error}; {way_on}") from error
            raise
        if (said := read_notice(folder)) is not None:
            raise TrainingError(f"{recipe.name}: {said}")
    if result.checkpoint is None:
        raise TrainingError(f"{recipe.name}: the run ended without a checkpoint")
    return result.checkpoint


def _storage(recipe: Recipe) -> str:
    return recipe.checkpoint.storage or str(home() / "ray")


def resume(name: str, changes: dict[str, Any] | None = None) -> TrainedRun:
    """Go on with an interrupted run by its name.

    Args:
        changes: settings of its recipe that do not change what is learned: the number of workers, ZeRO, the size of
            micro-batches, checkpoints, the tracker.

    Raises:
        TrainingError: there is no such run or no checkpoint of it, or what it was made from changed since.
        ConfigError: a setting that would change what is learned.
    """
    folder = resumable_folder(name)
    recorded = read_inputs(folder)
    if recorded is None:
        raise TrainingError(f"--resume {name}: {folder / INPUTS} is of another mmllm: start it again by its recipe")
    recipe = recorded.changed(changes or {})
    inputs, origins = _prepare(recipe)
    recorded.require_unchanged(inputs)
    storage = _storage(recipe)
    if not has_checkpoints(storage, name) and _finished_run(recipe) is None:
        raise TrainingError(f"--resume {name}: it has no checkpoint yet in {storage}: start it again by its recipe")
    return _train(inputs, origins, recorded, discard=False)


def _require_data(recipe: Recipe, profile: Profile, origins: Origins) -> None:
    """Files are checked and converted before any worker starts."""
    if recipe.evaluation_questions or recipe.word_alignment_steps:
        easy_vqa.fetch()
    next(training_samples(recipe.data, recipe.seed))
    if recipe.features == "real_time":
        if (missing := next((path for path in image_paths(recipe.data) if not path.is_file()), None)) is not None:
            raise TrainingError(f"{missing}: no such image, and the recipe's data names it")
        return
    features = StoredFeatures(features_folder(), origins.fingerprint, profile.vision.max_pixels)
    if (lacking := features.known_lack(image_paths(recipe.data))) is not None:
        features(lacking)  # says what is wrong with it


def _metrics(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What a bundle says of how its run went."""
    record = read_run(folder)
    lines = step_lines(read_metrics(folder / LOG))  # none where a run that was through had lost its folder
    metrics: dict[str, Any] = {key: lines[-1][key] for key in ("loss", "loss_ema", "seconds")} if lines else {}
    if record.answers:
        questions = HeldOutQuestions(recipe.evaluation_questions, recipe.seed).questions
        metrics["accuracy"] = {
            "before": scores_to_json(score_by_kind(questions, [answer.before or "" for answer in record.answers])),
            "after": scores_to_json(score_by_kind(questions, [answer.after or "" for answer in record.answers])),
            "baseline": scores_to_json(commonest_answer_baseline(questions)),
        }
    return metrics


def _finished_run(recipe: Recipe) -> TrainedRun | None:
    """The run that made the bundle of this name, if that was made by an equal recipe and no other run began since."""
    if not has_ended(runs_folder() / recipe.name):
        return None
    try:
        bundle = Bundle.open(bundles_folder() / recipe.name)
        made_by = Recipe.model_validate(bundle.info.recipe)
    except (BundleError, ValueError):
        return None
    return _read_run(bundle) if learns_the_same(made_by, recipe) else None


def _read_run(bundle: Bundle) -> TrainedRun:
    folder = runs_folder() / bundle.info.name
    scores = bundle.info.metrics.get("accuracy", {})
    return TrainedRun(bundle, folder, *(scores_from_json(scores.get(k, {})) for k in ("before", "after", "baseline")))
