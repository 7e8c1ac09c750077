"""The first losses of each embedded recipe, by the training code itself in one process.

CLIP is random but seeded, and the LM is computed in float32, so that every CPU gives them. `python -m
tests.train_jobs.golden_losses [RECIPE ...]` writes them anew to `tests/golden/losses.json`; `--check` compares all of
them, and a test the first few. A change of numbers there must be meant.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

import torch

from mmllm_core.models.home import home

N_LOSSES = 20
TOLERANCE = 0.02
FILE = Path(__file__).parent.parent / "golden" / "losses.json"


def recipes() -> list[str]:
    """Every recipe of the embedded profile that trains the multimodal LM."""
    from mmllm_core.config import Recipe
    from train_jobs.recipe import load_recipe, recipe_names

    loaded = {name: load_recipe(name) for name in recipe_names()}
    return [name for name, r in loaded.items() if isinstance(r, Recipe) and r.profile == "embedded"]


def first_losses(names: list[str], count: int = N_LOSSES) -> dict[str, list[float]]:
    """Losses of recipes' first steps, by one worker, which takes one recipe after another."""
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(_train_all, (names, count, Path(place), str(home())), nprocs=1)
        return {name: json.loads((Path(place) / f"{name}.json").read_text()) for name in names}


def _train_all(_rank: int, names: list[str], count: int, place: Path, home_folder: str) -> None:
    os.environ["MMLLM_HOME"] = home_folder
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import torch.distributed as dist

    from train_jobs.zero import import_deepspeed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    import_deepspeed("cpu").init_distributed("gloo")
    clip = _seeded_clip(place / "clip")
    for name in names:
        (place / f"{name}.json").write_text(json.dumps(_train(name, count, clip)))


def _train(name: str, count: int, clip: Path) -> list[float]:
    from mmllm_core.language import load_tokenizer
    from mmllm_core.models.resolve import resolve
    from mmllm_core.vision import ClipEncoder
    from train_jobs.origins import Origins, build_model
    from train_jobs.real_time_images import RealTimeImages
    from train_jobs.recipe import load_training_recipe, recipe_profile
    from train_jobs.schedule import learning_rates
    from train_jobs.training_data import Encoding, step_batches
    from train_jobs.training_step import seed_step, training_step
    from train_jobs.word_alignment_stage import align_connector
    from train_jobs.zero import initialise_deepspeed

    recipe = load_training_recipe(name)
    profile = recipe_profile(recipe)
    profile = profile.model_copy(update={"language": profile.language.model_copy(update={"dtype": "float32"})})
    encoder = ClipEncoder(profile.vision, clip)
    language = resolve(profile.language.source)
    origins = Origins(language, clip, encoder.fingerprint, encoder.d_vision, encoder.n_patches)
    tokenizer = load_tokenizer(language)
    real_time = recipe.features == "real_time"
    model = build_model(recipe, profile, origins, "cpu", encoder if real_time else None)
    images = RealTimeImages(encoder, profile.vision.max_pixels)
    if recipe.word_alignment_steps:
        align_connector(model, tokenizer, recipe, images, "cpu")
    engine = initialise_deepspeed(model, recipe)
    encoding = Encoding.of(recipe, profile, tokenizer, images.pixels if real_time else images, origins.n_patches)
    losses = []
    for step, batches in zip(range(count), step_batches(recipe, encoding), strict=False):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rates(recipe, step)[group["name"]]
        seed_step(recipe.seed, step, 0)
        losses.append(round(training_step(engine, batches, step=step).loss, 5))
    return losses


def _seeded_clip(folder: Path) -> Path:
    """A random vision tower of the embedded CLIP's architecture, in open_clip's layout."""
    from open_clip.model import _build_vision_tower
    from safetensors.torch import save_file

    from mmllm_core.config import ClipRecipe
    from train_jobs.recipe import load_recipe

    recipe = load_recipe("embedded-clip")
    assert isinstance(recipe, ClipRecipe)
    folder.mkdir()
    torch.manual_seed(0)
    values = recipe.architecture
    tower = _build_vision_tower(values["embed_dim"], values["vision_cfg"])
    save_file({f"visual.{k}": v for k, v in tower.state_dict().items()}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": values, "preprocess_cfg": {"size": values["vision_cfg"]["image_size"]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def equal(found: list[float], golden: list[float]) -> bool:
    """Whether losses are the recorded ones, as far as CPUs agree."""
    return all(math.isclose(one, other, rel_tol=TOLERANCE) for one, other in zip(found, golden, strict=True))


def main() -> None:
    """Record, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=recipes())
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in options.recipes:
        found = first_losses([name])[name]
        print(name, found[0], "->", found[-1], flush=True)
        if not options.check:
            known[name] = found
            FILE.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")
        elif not equal(found, known[name]):
            raise SystemExit(f"{name}: {found} and not {known[name]}")


if __name__ == "__main__":
    main()
