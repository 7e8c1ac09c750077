"""What `bench_training` times: our training on Ray Train workers, and the same model in loops that are plainer.

In: a `Setup`, the same for every loop: recipe, profile and where weights lie. Out: `Step`s, as each loop took them. A
loop is run in a process of its own, for it sets threads and environment as it needs them.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm_core.config import EasyVqaData, Profile, Recipe
from train_jobs.origins import Origins

RUN = "bench-training"


@dataclass(frozen=True)
class Step:
    """An optimizer step."""

    seconds: float
    samples: int
    """With at least one supervised token, as all of easy-VQA's have."""
    supervised: int
    """Supervised tokens."""
    tokens: int
    """Positions without padding; ours compute what conversations begin with once, and count it so."""


@dataclass(frozen=True)
class Setup:
    """What is trained, on what."""

    recipe: Recipe
    profile: Profile
    origins: Origins

    @classmethod
    def of(cls, steps: int, **changes: Any) -> "Setup":
        """The recipe `embedded-instruct` on its images alone, without what comes before and after its steps.

        Args:
            changes: of the recipe.
        """
        from train_jobs.origins import find_origins, starting_profile
        from train_jobs.recipe import load_training_recipe

        loaded = load_training_recipe("embedded-instruct")
        pictures = tuple(source for source in loaded.data.sources if isinstance(source, EasyVqaData))
        short = {
            "name": RUN,
            "data": loaded.data.model_copy(update={"sources": pictures}),
            "steps": steps,
            "warmup_steps": min(loaded.warmup_steps, steps),
            "word_alignment_steps": 0,
            "evaluation_questions": 0,
            "gpus_per_worker": 0.0,
            "max_restarts": 0,
            "tracker": "none",
        }
        values = loaded.model_copy(update=short).model_dump(mode="json") | changes
        recipe = Recipe.model_validate(values)
        profile = starting_profile(recipe)
        return cls(recipe, profile, find_origins(recipe, profile))

    @classmethod
    def of_single_questions(cls, steps: int) -> "Setup":
        """As many questions a step, each a conversation of its own with its image, as easy-VQA's rows are."""
        recipe = cls.of(steps).recipe
        (source,) = recipe.data.sources
        assert isinstance(source, EasyVqaData)
        n = source.questions_per_image
        rows = source.model_copy(update={"questions_per_image": 1, "caption_share": source.caption_share / n})
        return cls.of(
            steps,
            data=recipe.data.model_copy(update={"sources": (rows,)}).model_dump(mode="json"),
            batch_size=n * recipe.batch_size,
            micro_batch=n * recipe.micro_batch,
        )


def prepare() -> None:
    """Store the features that training needs, if the home lacks any; CLIP must be there."""
    from cluster.local import local_ray
    from mmllm_core.data.mixture import image_paths
    from mmllm_core.models.home import features_folder
    from train_jobs.embed_images import embed_recipe
    from train_jobs.stored_features import StoredFeatures

    setup = Setup.of(1)
    features = StoredFeatures(features_folder(), setup.origins.fingerprint, setup.profile.vision.max_pixels)
    if features.known_lack(image_paths(setup.recipe.data)) is not None:
        with local_ray():
            embed_recipe(setup.recipe)


def ray_train_steps(setup: Setup, loop: Callable[[dict[str, Any]], None] | None = None) -> list[Step]:
    """Steps of `mmllm train`, by the metrics log that it writes; it leaves nothing behind, and makes no bundle.

    Args:
        loop: what workers run, `train_loop` if not given.
    """
    from cluster.local import local_ray
    from mmllm_core.models.home import features_folder
    from train_jobs.launch import Kept, Workers, run_workers
    from train_jobs.progress import following, read_metrics, step_lines
    from train_jobs.run_folders import LOG
    from train_jobs.train_loop import LoopConfig, train_loop

    recipe = setup.recipe
    with tempfile.TemporaryDirectory(prefix=f"{RUN}-") as place, local_ray():
        log = Path(place) / "run" / LOG
        config = LoopConfig(
            recipe=recipe.model_dump(mode="json"),
            profile=setup.profile.model_dump(mode="json"),
            origins=setup.origins,
            features=features_folder(),
            folder=log.parent,
        )
        with following(log, recipe.steps, RUN):
            run_workers(
                loop or train_loop,
                vars(config),
                name=RUN,
                workers=Workers(recipe.workers, gpus=0.0),
                kept=Kept(str(Path(place) / "checkpoints")),
            )
        lines = step_lines(read_metrics(log))
    return [Step(line["step_seconds"], line["samples"], line["supervised"], line["tokens"]) for line in lines]


def pinned_train_loop(values: dict[str, Any]) -> None:
    """`train_loop`, each worker on a core of its own."""
    import ray.train
    import torch

    from train_jobs.train_loop import train_loop

    cores = sorted(os.sched_getaffinity(0))
    core = cores[ray.train.get_context().get_world_rank()]
    # Affinity is a thread's, and Ray started some before this one; new ones inherit it.
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})
    torch.set_num_threads(1)
    train_loop(values)


def bare_steps(setup: Setup) -> list[Step]:
    """Steps of a loop in PyTorch alone: the same model and batches, without Ray and DeepSpeed."""
    import torch

    from mmllm_core.language import load_tokenizer
    from mmllm_core.models.home import features_folder
    from train_jobs.origins import build_model
    from train_jobs.schedule import learning_rates
    from train_jobs.stored_features import StoredFeatures
    from train_jobs.training_data import Encoding, step_batches
    from train_jobs.training_step import seed_step
    from train_jobs.zero import BETAS

    recipe, profile, origins = setup.recipe, setup.profile, setup.origins
    model = build_model(recipe, profile, origins, "cpu")
    for parameter in model.parameters():
        if parameter.requires_grad:  # DeepSpeed makes of peft's float32 what the LM computes in, too
            parameter.data = parameter.data.to(model.connector.dtype)
    groups: list[dict[str, Any]] = [
        {"params": list(model.parameters_of(part)), "name": part} for part in recipe.trained
    ]
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=recipe.weight_decay)
    images = StoredFeatures(features_folder(), origins.fingerprint, profile.vision.max_pixels)
    encoding = Encoding.of(recipe, profile, load_tokenizer(origins.language), images, origins.n_patches)
    batches = step_batches(recipe, encoding)
    steps = []
    for number in range(recipe.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rates(recipe, number)[group["name"]]
        seed_step(recipe.seed, number, 0)
        micro_batches = next(batches)
        supervised = sum(batch.n_supervised for batch in micro_batches)
        for batch in micro_batches:
            loss = model(batch.input_ids, batch.attention_mask, batch.labels, batch.features, batch.packing)
            (loss / supervised).backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        tokens = sum(batch.n_tokens for batch in micro_batches)
        steps.append(Step(seconds, sum(len(batch.ids) for batch in micro_batches), supervised, tokens))
    return steps
