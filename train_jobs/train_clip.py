"""Contrastive CLIP training with open_clip, as a Ray Train job; it also makes the embedded CLIP.

In: a `ClipRecipe`. Out: a folder in open_clip's layout (`open_clip_config.json`, `open_clip_model.safetensors`)
that `mmllm_core.vision.ClipEncoder` and open_clip itself can load.

Run it as `mmllm train embedded-clip` or `ray job submit -- python -m train_jobs.train_clip`.
"""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmllm_core.artifact import building, is_built
from mmllm_core.config import ClipRecipe, TrainedSource, parse_overrides
from mmllm_core.data import easy_vqa
from mmllm_core.errors import TrainingError
from mmllm_core.models.home import home
from mmllm_core.models.resolve import trained_folder
from mmllm_core.vision import CLIP_CONFIG, CLIP_WEIGHTS
from train_jobs.launch import Kept, Workers, remove_run, run_workers, worker_device
from train_jobs.progress import MetricsLog, Stopwatch, following
from train_jobs.recipe import load_recipe
from train_jobs.schedule import rate_share

_PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}


def train_clip(recipe: ClipRecipe) -> Path:
    """Train CLIP, or reuse the folder that an equal recipe made before.

    Returns:
        The weights' folder.

    Raises:
        TrainingError: a worker failed or the loss is not finite.
    """
    output = trained_folder(TrainedSource(recipe=recipe.name))
    inputs = {"recipe": recipe.model_dump(mode="json"), "data": easy_vqa.SOURCE.sha256}
    if is_built(output, inputs):
        return output
    data = easy_vqa.fetch()
    log = home() / "runs" / recipe.name / "metrics.jsonl"
    log.unlink(missing_ok=True)
    remove_run(str(home() / "ray"), recipe.name)  # it would be gone on with
    config = {"recipe": recipe.model_dump(mode="json"), "data": str(data), "log": str(log)}
    with following(log, recipe.steps, "training CLIP"):
        result = run_workers(
            _worker,
            config,
            name=recipe.name,
            workers=Workers(recipe.workers, cpus=recipe.cpus_per_worker),
            kept=Kept(str(home() / "ray")),
        )
    with building(output, inputs) as scratch, result.checkpoint.as_directory() as checkpoint:
        for name in (CLIP_CONFIG, CLIP_WEIGHTS):
            shutil.copy(Path(checkpoint) / name, scratch / name)
    return output


def contrastive_loss(image: Tensor, text: Tensor, caption_of: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss where images of a batch may share a caption: UniCL (Yang et al., arXiv:2204.03610).

    Args:
        image: (b, d) unit vectors.
        text: (c, d) unit vectors of the batch's distinct captions, c <= b; each describes at least one image.
        caption_of: int64 (b,) which caption belongs to each image.
        scale: scalar, the inverse temperature.
    """
    logits = scale * image @ text.T  # (b, c)
    positives = nn.functional.one_hot(caption_of, text.shape[0]).to(logits.dtype)  # (b, c)
    weights = positives.sum(0) / len(image)  # (c,) share of the batch that a caption describes
    to_image = -(positives * logits.log_softmax(0)).sum(0) / positives.sum(0)  # (c,)
    return (nn.functional.cross_entropy(logits, caption_of) + (weights * to_image).sum()) / 2


def _worker(config: dict[str, Any]) -> None:
    import open_clip
    from ray.train.torch import prepare_model

    recipe = ClipRecipe.model_validate(config["recipe"])
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.manual_seed(recipe.seed)
    clip_config = {"model_cfg": recipe.architecture, "preprocess_cfg": _PREPROCESS}
    model = open_clip.model.CLIP(**recipe.architecture, output_dict=True)
    tokenizer = open_clip.SimpleTokenizer(context_length=recipe.architecture["text_cfg"]["context_length"])
    pixels, caption_ids, captions = _load_captioned_images(Path(config["data"]))
    device = torch.device(worker_device())
    tokens = tokenizer(captions).to(device)  # (n_captions, context_length)
    parallel = prepare_model(model)
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, recipe.weight_decay), betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    log = MetricsLog(Path(config["log"])) if rank == 0 else None
    # Every worker draws the same order and takes its own share of each batch.
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.empty(0, dtype=torch.int64)
    watch = Stopwatch()
    loss_value = math.nan
    for step in range(recipe.steps):
        if len(order) < recipe.batch_size:
            order = torch.randperm(len(pixels), generator=generator)
        batch, order = order[: recipe.batch_size], order[recipe.batch_size :]
        share = batch[rank::world]
        images = _augment(_normalise(pixels[share]), generator).to(device)  # (b, 3, h, w)
        distinct, caption_of = caption_ids[share].unique(return_inverse=True)
        output = parallel(images, tokens[distinct.to(device)])
        loss = contrastive_loss(
            output["image_features"], output["text_features"], caption_of.to(device), output["logit_scale"]
        )
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate_share("cosine", step, recipe.warmup_steps, recipe.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as in CLIP
        loss_value = float(loss.detach())
        if not math.isfinite(loss_value):
            raise TrainingError(f"step {step}: the CLIP loss is {loss_value}: lower learning_rate in the recipe")
        if log and (step + 1) % 5 == 0:
            log.write(step=step + 1, loss=loss_value, seconds=watch.seconds)
    zero_shot = _zero_shot_accuracy(model, Path(config["data"]), tokens, captions)
    if log:
        log.write(phase=f"zero-shot {zero_shot:.1%}", zero_shot=zero_shot)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _save(model, clip_config, Path(folder)) if rank == 0 else None
        ray.train.report({"loss": loss_value, "zero_shot": zero_shot}, checkpoint=checkpoint)


def _save(model: nn.Module, clip_config: dict[str, Any], folder: Path) -> ray.train.Checkpoint:
    from safetensors.torch import save_file

    (folder / CLIP_CONFIG).write_text(json.dumps(clip_config, indent=2), encoding="utf-8")
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, folder / CLIP_WEIGHTS)
    return ray.train.Checkpoint.from_directory(folder)


@torch.inference_mode()
def _zero_shot_accuracy(model: Any, data: Path, tokens: Tensor, captions: list[str]) -> float:
    """Share of held-out images whose nearest caption is their own."""
    model.eval()
    pixels, caption_ids, test_captions = _load_captioned_images(data, "test")
    wanted = torch.tensor([captions.index(caption) for caption in test_captions])[caption_ids]
    text = model.encode_text(tokens, normalize=True)  # (c, d)
    found = [
        (model.encode_image(_normalise(batch).to(tokens.device), normalize=True) @ text.T).argmax(1).cpu()
        for batch in pixels.split(256)
    ]
    return float((torch.cat(found) == wanted).float().mean())


def _load_captioned_images(data: Path, split: easy_vqa.Split = "train") -> tuple[Tensor, Tensor, list[str]]:
    """uint8 pixels (n, 3, h, w), int64 caption ids (n,) and the distinct captions; uncaptioned images are left out."""
    from PIL import Image

    found = [(image.image, image.caption) for image in easy_vqa.load_split(data, split)]
    captioned = [(path, caption) for path, caption in found if caption]
    arrays: list[NDArray[np.uint8]] = [np.asarray(Image.open(path).convert("RGB")) for path, _ in captioned]
    captions = sorted({caption for _, caption in captioned})
    ids = torch.tensor([captions.index(caption) for _, caption in captioned])
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), ids, captions


def _normalise(pixels: Tensor) -> Tensor:
    mean = torch.tensor(_PREPROCESS["mean"]).view(3, 1, 1)
    std = torch.tensor(_PREPROCESS["std"]).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images left to right. Upside down would be another picture: triangles stand upright."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def main() -> None:
    """Entry point of `python -m train_jobs.train_clip [RECIPE] [key=value ...]`."""
    import sys

    name, *overrides = sys.argv[1:] or ["embedded-clip"]
    recipe = load_recipe(name, parse_overrides(overrides))
    if not isinstance(recipe, ClipRecipe):
        raise SystemExit(f"recipe '{name}' does not train CLIP: run it with train_jobs.train")
    print(train_clip(recipe))


if __name__ == "__main__":
    main()
