"""Precompute CLIP features into the feature store: a Ray Data pipeline over an actor pool.

In: image files, or the recipe that wants them. Out: new shards in the store, for exactly the images whose features it
lacks or holds damaged. Pictures with equal pixels are encoded once, whichever worker meets them; a run that was cut
short leaves whole shards, and the next one computes the rest.

Run it as `mmllm embed RECIPE` or `ray job submit -- python -m train_jobs.embed_images RECIPE`.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from PIL import Image

from mmllm_core.config import Recipe, VisionConfig, parse_overrides
from mmllm_core.data import easy_vqa
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.data.image_keys import ImageKeys
from mmllm_core.data.mixture import image_paths
from mmllm_core.errors import ImageError, TrainingError
from mmllm_core.models.home import features_folder, image_keys
from mmllm_core.vision import ClipEncoder, feature_key
from train_jobs.launch import has_gpus, prepare_ray_data, readable_errors
from train_jobs.origins import starting_profile, starting_vision
from train_jobs.progress import progress_bar
from train_jobs.recipe import load_training_recipe

NEW, STORED, BROKEN = "new", "stored", "broken"


@dataclass(frozen=True)
class EmbedOptions:
    """How images are embedded."""

    workers: int = 1
    """Encoders in the pool, one CPU (or GPU, where Ray has some) each."""
    batch: int = 128
    """Images an encoder takes at once; what is new of them becomes a shard."""
    skip_broken: bool = False
    """Leave out and count what cannot be read, instead of stopping at it."""
    verify: bool = True
    """Read what is stored of the images, so that damage is found and mended. It costs a pass over their features."""


@dataclass(frozen=True)
class Embedded:
    """What came of the images."""

    new: int
    stored: int
    """Stored before, or with the same pixels as another of the images."""
    broken: tuple[str, ...]
    """One line for each image that was left out."""


def embed_images(
    paths: Iterable[Path], vision: VisionConfig, weights: Path, options: EmbedOptions = EmbedOptions()
) -> Embedded:
    """Encode the images whose features the store lacks.

    Args:
        weights: folder of the CLIP weights.

    Raises:
        TrainingError: a file is missing or not an image; the message names it.
        FeatureStoreError: the store cannot be reached.
    """
    prepare_ray_data()
    rows = [{"path": str(Path(path).absolute())} for path in paths]
    places = (features_folder(), str(image_keys()))
    FeatureStore(places[0], fingerprint="-")  # fail before a worker starts if it cannot be reached
    if not rows:
        return Embedded(0, 0, ())
    gpus = has_gpus(options.workers)
    claims = ray.remote(num_cpus=0)(_Claims).remote()
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), options.workers * 4))
    embedded = dataset.map_batches(
        _Embedder,
        fn_constructor_args=(vision.model_dump(mode="json"), str(weights), places, claims, options, gpus),
        batch_size=options.batch,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
        num_cpus=0 if gpus else 1,
        num_gpus=1 if gpus else 0,
    )
    counts = {NEW: 0, STORED: 0, BROKEN: 0}
    broken: list[str] = []
    with readable_errors("embedding images"), progress_bar() as progress:
        task = progress.add_task("embedding images", total=len(rows), note="starting")
        for block in embedded.iter_batches(batch_size=None):
            for became, problem in zip(block["became"], block["problem"], strict=True):
                counts[str(became)] += 1
                broken += [str(problem)] if problem else []
            note = f"{counts[NEW]} new" + (f", {len(broken)} broken" if broken else "")
            progress.update(task, advance=len(block["became"]), note=note)
    return Embedded(counts[NEW], counts[STORED], tuple(sorted(broken)))


class _Claims:
    """Who encodes a picture that several workers meet at a time."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}

    def claim(self, wanted: dict[str, str]) -> list[str]:
        """Which of the keys are the asker's.

        Args:
            wanted: key -> image file. A file that asks again keeps its key, so that a batch can be run again.
        """
        return [key for key, path in wanted.items() if self._owners.setdefault(key, path) == path]


class _Embedder:
    """One encoder of the pool."""

    def __init__(
        self,
        vision: dict[str, Any],
        weights: str,
        places: tuple[str, str],
        claims: Any,
        options: EmbedOptions,
        gpu: bool,
    ):
        store, keys = places  # of the features and of the pixel hashes
        self._encoder = ClipEncoder(VisionConfig.model_validate(vision), Path(weights), "cuda" if gpu else "cpu")
        self._store = FeatureStore(store, self._encoder.fingerprint)
        self._keys = ImageKeys(Path(keys), self._encoder.config.max_pixels)
        self._claims = claims
        self._options = options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        paths = [Path(path) for path in batch["path"]]
        became, problems = [STORED] * len(paths), [""] * len(paths)
        rows: dict[str, int] = {}
        images: dict[str, Image.Image] = {}

        def leave_out(row: int, error: ImageError) -> None:
            if not self._options.skip_broken:
                raise TrainingError(f"{error}: mend it, or leave it out with --skip-broken") from error
            became[row], problems[row] = BROKEN, str(error)

        for row, path in enumerate(paths):
            try:
                rows.setdefault(self._key(path, images), row)
            except ImageError as error:
                leave_out(row, error)
        self._store.refresh()
        missing = self._store.missing(rows, read=self._options.verify)
        mine = ray.get(self._claims.claim.remote({key: str(paths[rows[key]]) for key in missing})) if missing else []
        for key in [key for key in mine if key not in images]:
            try:
                images[key] = self._decode(paths[rows[key]], key)
            except ImageError as error:
                leave_out(rows[key], error)
                mine.remove(key)
        if mine:
            self._store.write(mine, self._encoder.encode([images[key] for key in mine]))  # (n, n_patches, d_vision)
        for key in mine:
            became[rows[key]] = NEW
        return {"became": np.array(became, dtype=object), "problem": np.array(problems, dtype=object)}

    def _key(self, path: Path, images: dict[str, Image.Image]) -> str:
        """Feature key of a file; if it had to be decoded for that, `images` keeps it for the encoder."""
        pixels = self._keys.remembered(path)
        if pixels is not None:
            return feature_key(pixels, self._encoder.fingerprint)
        pixels, image = self._keys.decode(path)
        key = feature_key(pixels, self._encoder.fingerprint)
        images.setdefault(key, image)
        return key

    def _decode(self, path: Path, key: str) -> Image.Image:
        """Decode a file whose key was remembered; features never go under the key of other pixels."""
        pixels, image = self._keys.decode(path)
        if feature_key(pixels, self._encoder.fingerprint) != key:
            raise ImageError(f"{path}: was changed while its size and time stayed the same: embed it again")
        return image


def embed_recipe(recipe: Recipe, options: EmbedOptions = EmbedOptions()) -> Embedded:
    """Embed the images that a recipe aligns, trains and is evaluated on, with the CLIP that it starts from.

    Raises:
        TrainingError, FeatureStoreError: as `embed_images`.
        DataError: a file that the recipe names cannot be read.
    """
    profile = starting_profile(recipe)
    weights = starting_vision(recipe, profile)
    paths = list(image_paths(recipe.data))
    splits: dict[easy_vqa.Split, int] = {"train": recipe.word_alignment_steps, "test": recipe.evaluation_questions}
    for split, wanted in splits.items():
        if wanted:
            paths += [image.image for image in easy_vqa.load_split(easy_vqa.fetch(), split)]
    return embed_images(dict.fromkeys(paths), profile.vision, weights, options)


def main() -> None:
    """Entry point of `python -m train_jobs.embed_images RECIPE [key=value ...]`."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m train_jobs.embed_images RECIPE [key=value ...]")
    print(embed_recipe(load_training_recipe(sys.argv[1], parse_overrides(sys.argv[2:]))))


if __name__ == "__main__":
    main()
