"""A checkpoint of a run: what was trained, what the optimizer knows of it, and how far the run has come.

    weights.safetensors      float32, trained parameters alone, by the model's own names
    exp_avg.safetensors, exp_avg_sq.safetensors     Adam's moments, by the same names
    state.json               step, optimizer steps, smoothed loss, seconds, and answers of before training
    adapter_config.json      peft's, where an adapter is trained

Whole tensors: a run goes on with another number of workers or another ZeRO stage. Data position and random numbers
follow from the step alone (`mmllm_core.data.sampling`, `train_jobs.training_step`), so that nothing of them is kept.
Does not know Ray or where checkpoints are uploaded to.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm_core.errors import TrainingError
from train_jobs.optimizer_state import MOMENTS, TrainedState, gather

if TYPE_CHECKING:
    from torch import Tensor

    from mmllm_core.model import MultimodalLM

WEIGHTS, STATE = "weights.safetensors", "state.json"
ADAPTER_CONFIG = "adapter_config.json"
_SMOOTHING = 0.95
"""Of the loss's moving average: about twenty steps' memory."""


@dataclass(frozen=True)
class RunState:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    loss_ema: float
    """Of the loss, its exponential moving average; 0 before anything was learned."""
    before: list[str] = field(default_factory=list)
    """Answers to the held-out questions of before training."""
    seconds: float = 0.0
    """Spent in steps so far."""

    def after_step(self, loss: float, seconds: float) -> "RunState":
        """One step further.

        The loss's moving average is without the bias towards its beginning (as Adam's moments: arXiv:1412.6980, section
        3); a step that left everything out, whose loss is no number, does not count in it.
        """
        ema = self.loss_ema
        if math.isfinite(loss):
            weight = (1 - _SMOOTHING) / (1 - _SMOOTHING ** (self.step + 1))
            ema = ema + weight * (loss - ema) if ema else loss  # 0: nothing was learned yet
        return replace(self, step=self.step + 1, loss_ema=ema, seconds=self.seconds + seconds)


def save_checkpoint(engine: Any, manifest: set[str], folder: Path | None, state: RunState) -> None:
    """Write a checkpoint into an empty folder; all workers call it, and one writes.

    Args:
        folder: None on the workers that do not write.
        manifest: names that must be saved: `MultimodalLM.trainable_names` of before DeepSpeed took the model.

    Raises:
        TrainingError: what would be saved is not the manifest, or the disk does not take it.
    """
    from safetensors.torch import save_file

    gathered = gather(engine, keep=folder is not None)
    if gathered is None or folder is None:
        return
    check_manifest(gathered, manifest)
    try:
        save_file(gathered.weights, folder / WEIGHTS)
        for moment in MOMENTS:
            save_file(gathered.moments[moment], folder / f"{moment}.safetensors")
        adapter: Any = engine.module.adapter
        if adapter is not None:
            adapter.peft_config["default"].save_pretrained(str(folder))
        values = asdict(state) | {"adam_steps": gathered.adam_steps}
        (folder / STATE).write_text(json.dumps(values), encoding="utf-8")
    except Exception as error:
        # safetensors raises its own error for a full disk, with the system's words in it
        raise TrainingError(
            f"step {state.step}: the checkpoint cannot be written to {folder}: {error}; the last one stays: "
            "free space and go on with 'mmllm train --resume'"
        ) from error


def check_manifest(state: TrainedState, manifest: set[str]) -> None:
    """Hold what is to be saved against what is trained.

    Raises:
        TrainingError: a parameter is lacking, empty or not a trained one.
    """
    for kind, tensors in {"weights": state.weights, **state.moments}.items():
        saved = set(tensors)
        if saved != manifest:
            wrong = sorted(saved ^ manifest)[0]
            raise TrainingError(f"checkpoint: {kind} of '{wrong}' are {'lacking' if wrong in manifest else 'surplus'}")
        if empty := sorted(name for name, tensor in tensors.items() if not tensor.numel()):
            raise TrainingError(f"checkpoint: {kind} of '{empty[0]}' are empty")


def load_checkpoint(folder: Path) -> tuple[TrainedState, RunState]:
    """Read a checkpoint.

    Raises:
        TrainingError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        adam_steps = values.pop("adam_steps")
        weights = load_weights_alone(folder)
        moments = {moment: load_file(folder / f"{moment}.safetensors") for moment in MOMENTS}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TrainingError(f"{folder}: not a whole checkpoint: {error}") from error
    return TrainedState(weights, moments, adam_steps), RunState(**values)


def load_weights_alone(folder: Path) -> dict[str, "Tensor"]:
    """The trained weights of a checkpoint, float32, by the model's own names.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{folder}: not a whole checkpoint: {error}") from error


def load_weights(model: "MultimodalLM", weights: dict[str, "Tensor"]) -> None:
    """Put trained weights into a model that DeepSpeed has not taken yet.

    Raises:
        TrainingError: the model trains other parameters than the checkpoint holds, or of other shapes.
    """
    import torch

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wrong := sorted(set(trained) ^ set(weights)):
        raise TrainingError(f"checkpoint and recipe do not train the same: '{wrong[0]}' is in one of them alone")
    with torch.no_grad():
        for name, parameter in trained.items():
            if parameter.shape != weights[name].shape:
                raise TrainingError(
                    f"'{name}' is {tuple(weights[name].shape)} in the checkpoint, {tuple(parameter.shape)} in the model"
                )
            parameter.copy_(weights[name])
