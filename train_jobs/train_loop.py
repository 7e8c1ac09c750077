"""What each Ray Train worker does: build the model, take steps, keep checkpoints, ask questions before and after.

In: a `LoopConfig`. Out: checkpoints, reported to Ray; lines in the metrics log, and answers beside it. A worker that is
started again goes on from the last checkpoint as if nothing had been. Does not know bundles, plots or trackers.
"""

import hashlib
import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train

from mmllm_core.config import Profile, Recipe
from mmllm_core.errors import MmllmError
from train_jobs.checkpoint import RunState, load_checkpoint, load_weights, save_checkpoint
from train_jobs.checkpoint_upload import CheckpointUploads
from train_jobs.held_out import HeldOutQuestions, write_answers
from train_jobs.launch import worker_device
from train_jobs.origins import Origins, build_model
from train_jobs.progress import MetricsLog
from train_jobs.run_folders import LOG
from train_jobs.run_record import ANSWERS
from train_jobs.schedule import learning_rates
from train_jobs.stop_notice import leave_notice, read_notice
from train_jobs.stored_features import StoredFeatures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm_core.model import MultimodalLM
    from mmllm_core.vision import ClipEncoder
    from train_jobs.optimizer_state import TrainedState
    from train_jobs.real_time_images import RealTimeImages
    from train_jobs.throughput import ModelWork
    from train_jobs.training_step import StepResult

_NOTHING_LEARNED = 1e9
"""What the loss is taken for where every step so far was left out; Ray keeps no infinities."""
_LOOK_AROUND = 1.0
"""Seconds between two looks for a preemption notice, for which workers wait for each other."""


@dataclass(frozen=True)
class LoopConfig:
    """All that a worker is told; picklable and the same for each."""

    recipe: dict[str, Any]
    profile: dict[str, Any]
    origins: Origins
    features: str
    """The feature store."""
    folder: Path
    """The run's: its log, and answers."""


def train_loop(values: dict[str, Any]) -> None:
    """Train one stage; runs in a Ray Train worker.

    Raises:
        TrainingError: training cannot go on; it is not tried again.
    """
    config = LoopConfig(**values)
    if read_notice(config.folder) is not None:
        return  # started again after an error that would only come again
    try:
        _Worker(config).train()
    except MmllmError as error:
        leave_notice(config.folder, error)
        raise


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


class _Worker:
    """One worker's part in a run."""

    def __init__(self, config: LoopConfig):
        from mmllm_core.language import load_tokenizer

        self.config = config
        self.recipe, self.profile = Recipe.model_validate(config.recipe), Profile.model_validate(config.profile)
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.log = MetricsLog(config.folder / LOG) if self.rank == 0 else None
        # A worker that was killed could not remove what it had not uploaded yet.
        self.scratch = f"mmllm-{hashlib.sha256(str(config.folder).encode()).hexdigest()[:16]}-"
        if self.rank == 0:
            for left in Path(tempfile.gettempdir()).glob(f"{self.scratch}*"):
                shutil.rmtree(left, ignore_errors=True)
        self.device = worker_device()
        self.uploads = CheckpointUploads()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.origins.language)
        self.questions = HeldOutQuestions(self.recipe.evaluation_questions, self.recipe.seed)
        self.encoder: ClipEncoder | None = None
        self.images: StoredFeatures | RealTimeImages
        if self.recipe.features == "real_time":
            self._see_in_real_time()
        else:
            max_pixels = self.profile.vision.max_pixels
            self.images = StoredFeatures(config.features, config.origins.fingerprint, max_pixels)

    def _see_in_real_time(self) -> None:
        from mmllm_core.vision import ClipEncoder
        from train_jobs.real_time_images import RealTimeImages

        self.encoder = ClipEncoder(self.profile.vision, self.config.origins.vision, self.device)
        self.images = RealTimeImages(self.encoder, self.profile.vision.max_pixels)

    def train(self) -> None:
        """All of it."""
        from train_jobs.optimizer_state import scatter
        from train_jobs.throughput import ModelWork
        from train_jobs.zero import initialise_deepspeed

        self._say(phase="loading the LM")
        model = self._build()
        manifest = model.trainable_names()
        work = ModelWork.of(model, self.encoder.tower if self.encoder else None)
        trained, state = self._start(model)
        engine = initialise_deepspeed(model, self.recipe)
        if trained is not None:
            scatter(engine, trained)
            del trained
        state = self._steps(engine, manifest, work, state)
        self._say(phase="asking after tuning")
        after = self._ask(self._tuned_model(engine))
        if self.rank == 0:
            write_answers(self.config.folder / ANSWERS, self.questions.questions, state.before, after)

    def _build(self) -> "MultimodalLM":
        return build_model(self.recipe, self.profile, self.config.origins, self.device, self.encoder)

    def _start(self, model: "MultimodalLM") -> tuple["TrainedState | None", RunState]:
        """Give the model the weights that it starts this attempt with."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                trained, state = load_checkpoint(Path(folder))
            load_weights(model, trained.weights)
            self._say(event="resumed", step=state.step)
            return trained, state
        self._say(phase="asking before tuning")
        before = self._ask(model)
        if self.recipe.word_alignment_steps and self.config.origins.bundle is None:
            from train_jobs.word_alignment_stage import align_connector

            self._say(phase="aligning images to words")
            align_connector(model, self.tokenizer, self.recipe, self.images, self.device)
        return None, RunState(step=0, loss_ema=0.0, before=before)

    def _steps(self, engine: Any, manifest: set[str], work: "ModelWork", state: RunState) -> RunState:
        from train_jobs.training_data import Encoding, step_batches
        from train_jobs.training_step import seed_step, training_step

        recipe = self.recipe
        images = self.images if isinstance(self.images, StoredFeatures) else self.images.pixels
        encoding = Encoding.of(recipe, self.profile, self.tokenizer, images, self.config.origins.n_patches)
        batches = step_batches(recipe, encoding, rank=self.rank, world=self.world, start_step=state.step)
        self._say(phase="training", workers=self.world)
        looked, saved_for = time.monotonic(), None
        while state.step < recipe.steps:
            began = time.monotonic()
            rates = learning_rates(recipe, state.step)
            for group in engine.optimizer.param_groups:
                group["lr"] = rates[group["name"]]
            seed_step(recipe.seed, state.step, self.rank)
            done = training_step(engine, next(batches), step=state.step + 1, on_non_finite=recipe.on_non_finite)
            seconds = time.monotonic() - began
            state = state.after_step(done.loss, seconds)
            memory, look = self._worst(engine.device, time.monotonic() - looked > _LOOK_AROUND)
            self._say_step(state, done, rates, seconds, memory, work)
            due = state.step % recipe.checkpoint.every_steps == 0 or state.step == recipe.steps
            if look:
                looked, notice = time.monotonic(), ray.train.get_preemption_info()
                if notice is not None and notice.preempted_node_ids != saved_for:
                    saved_for, due = notice.preempted_node_ids, True
                    self._say(event="preemption", step=state.step, nodes=notice.preempted_node_ids)
            if due:
                ends = state.step == recipe.steps or saved_for is not None
                self._save(engine, manifest, state, wait=ends)
        return state

    def _save(self, engine: Any, manifest: set[str], state: RunState, *, wait: bool) -> None:
        """Write a checkpoint, and have Ray upload it while training goes on, unless it is to wait."""
        folder = Path(tempfile.mkdtemp(prefix=self.scratch)) if self.rank == 0 else None
        try:
            save_checkpoint(engine, manifest, folder, state)
            if folder:
                self.uploads.begin()
        except Exception:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        mode = ray.train.CheckpointUploadMode
        ray.train.report(
            {"step": state.step, "loss_ema": state.loss_ema or _NOTHING_LEARNED},
            checkpoint=ray.train.Checkpoint.from_directory(folder) if folder else None,
            checkpoint_upload_mode=mode.SYNC if wait else mode.ASYNC,
            checkpoint_upload_fn=self.uploads,
            delete_local_checkpoint_after_upload=True,
        )
        self._say(event="checkpoint", step=state.step)

    def _ask(self, model: "MultimodalLM") -> list[str]:
        return self.questions.ask(model, self.tokenizer, self.images)

    def _tuned_model(self, engine: Any) -> "MultimodalLM":
        """The model of the bundle; what is trained is changed by it, so that no checkpoint may follow."""
        from mmllm_core.language import interpolate_adapter

        model = self._whole_model(engine)
        model.connector.float()
        if self.recipe.lora:
            adapter = {name: weight for name, weight in model.named_parameters() if ".lora_" in name}
            for weight in adapter.values():  # as peft loads it
                weight.data = weight.data.float()
            interpolate_adapter(adapter, self.recipe.lora.interpolation)
        return model

    def _whole_model(self, engine: Any) -> "MultimodalLM":
        """The trained model, to generate with; where ZeRO-3 shards it, workers build it anew and whole."""
        from train_jobs.optimizer_state import gather

        if engine.zero_optimization_stage() < 3 or not self.questions.questions:
            model: MultimodalLM = engine.module
            return model
        trained = gather(engine, keep=True, moments=False)
        assert trained is not None
        engine.destroy()
        if self.encoder is not None:  # its tower is sharded too
            self._see_in_real_time()
        model = self._build()
        load_weights(model, trained.weights)
        return model

    def _worst(self, device: Any, look: bool) -> tuple[float, bool]:
        """Over all workers: the most memory taken in GB, and whether any wants to look for a notice."""
        import torch
        import torch.distributed as dist

        from train_jobs.throughput import memory_gb

        values = torch.tensor([memory_gb(device), float(look)], device=device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return round(float(values[0]), 3), bool(values[1])

    def _say_step(
        self,
        state: RunState,
        done: "StepResult",
        rates: dict[str, float],
        seconds: float,
        memory: float,
        work: "ModelWork",
    ) -> None:
        if self.log is None:
            return
        from mmllm_core.language import compute_dtype
        from train_jobs.accelerators import peak_flops

        n_features = done.images * self.config.origins.n_patches
        n_patches = done.images * self.encoder.tower.n_tokens if self.encoder else 0
        flops = work.step_flops(done.tokens, done.read / done.samples, done.supervised, n_features, n_patches)
        peak = peak_flops(self.device, compute_dtype(self.profile.language.dtype, self.device))
        self._say(
            step=state.step,
            loss=_finite(done.loss),
            loss_ema=state.loss_ema,
            grad_norm=_finite(done.grad_norm),
            **{f"lr_{part}": rate for part, rate in rates.items()},
            tokens=done.tokens,
            supervised=done.supervised,
            samples=done.samples,
            step_seconds=round(seconds, 4),
            tokens_per_second=round(done.tokens / seconds, 1),
            samples_per_second=round(done.samples / seconds, 3),
            mfu=round(flops / (seconds * peak * self.world), 4) if peak else None,
            memory_gb=memory,
            seconds=round(state.seconds, 1),
        )
        if done.skipped:
            self._say(event="skipped", step=state.step, samples=list(done.skipped))

    def _say(self, **values: Any) -> None:
        if self.log is not None:
            self.log.write(**values)
