"""Precompute CLIP features into the feature store: a Ray Data pipeline over an actor pool.

In: image files and a profile. Out: new shards in the store, for exactly the images that it lacks. Pictures with
equal pixels are encoded once.

Run it as `mmllm embed` or `ray job submit -- python -m train_jobs.embed_images`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
from PIL import Image

from mmllm_core.config import VisionConfig
from mmllm_core.data import easy_vqa
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.errors import ImageError, TrainingError
from mmllm_core.models.home import features_folder
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from mmllm_core.vision import ClipEncoder, decode_image
from train_jobs.launch import has_gpus, prepare_ray_data, readable_errors
from train_jobs.progress import progress_bar


def embed_images(
    paths: Sequence[Path], vision: VisionConfig, weights: Path, *, workers: int = 1, batch: int = 128
) -> int:
    """Encode the images that the store lacks.

    Args:
        weights: folder of the CLIP weights.
        workers: encoders in the pool, one CPU (or GPU, where Ray has some) each.
        batch: images an encoder takes at once.

    Returns:
        How many features were written.

    Raises:
        TrainingError: a file is missing or not an image; the message names it.
    """
    prepare_ray_data()
    gpus = has_gpus(workers)
    dataset = ray.data.from_items([{"path": str(path)} for path in paths], override_num_blocks=workers * 4)
    written = dataset.map_batches(
        _Embedder,
        fn_constructor_args=(vision.model_dump(mode="json"), str(weights), str(features_folder()), gpus),
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=0 if gpus else 1,
        num_gpus=1 if gpus else 0,
    )
    total = 0
    with readable_errors("embedding images"), progress_bar() as progress:
        task = progress.add_task("embedding images", total=len(paths), note="starting")
        for block in written.iter_batches(batch_size=None):
            total += int(block["written"].sum())
            progress.update(task, advance=len(block["written"]), note=f"{total} new")
    return total


class _Embedder:
    """One encoder of the pool."""

    def __init__(self, vision: dict[str, Any], weights: str, store: str, gpu: bool):
        self._encoder = ClipEncoder(VisionConfig.model_validate(vision), Path(weights), "cuda" if gpu else "cpu")
        self._store = FeatureStore(Path(store))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        by_key: dict[str, tuple[int, Image.Image]] = {}
        for row, path in enumerate(batch["path"]):
            try:
                image = decode_image(Path(path).read_bytes(), self._encoder.config.max_pixels)
            except (ImageError, OSError) as error:
                raise TrainingError(f"{path}: {error}") from error
            by_key.setdefault(self._encoder.key(image), (row, image))
        self._store.refresh()
        missing = self._store.missing(by_key)
        if missing:
            features = self._encoder.encode([by_key[key][1] for key in missing])  # (n, n_patches, d_vision)
            self._store.write(missing, features)
        written = np.zeros(len(batch["path"]), dtype=np.int64)
        written[[by_key[key][0] for key in missing]] = 1
        return {"written": written}


def embed_easy_vqa(profile_name: str, *, workers: int = 1) -> int:
    """Embed both splits of easy-VQA with a profile's CLIP."""
    vision = load_profile(profile_name).vision
    data = easy_vqa.fetch()
    splits: tuple[easy_vqa.Split, ...] = ("train", "test")
    paths = [image.image for split in splits for image in easy_vqa.load_split(data, split)]
    return embed_images(paths, vision, resolve(vision.source), workers=workers)


if __name__ == "__main__":
    import sys

    print(embed_easy_vqa(sys.argv[1] if len(sys.argv) > 1 else "embedded"))
