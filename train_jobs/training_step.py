"""One optimizer step: micro-batches forward and backward, gradients of the mean over all supervised tokens.

In: a DeepSpeed engine and this worker's micro-batches. Out: what the step measured. Every worker runs as many
micro-batches as the one with the most, the missing ones blank, for they exchange gradients in each. Does not know
data, recipes or checkpoints.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmllm_core.data.collate import Batch, blank_batch
from mmllm_core.errors import TrainingError


@dataclass(frozen=True)
class StepResult:
    """Of all workers together."""

    loss: float
    """Per supervised token that was learned from; not a number if none was."""
    grad_norm: float
    """Before clipping; infinite where DeepSpeed dropped the step."""
    tokens: int
    """Positions computed: what the conversations of a micro-batch begin with counts once."""
    read: int
    """Positions of all conversations apart."""
    supervised: int
    samples: int
    images: int
    skipped: tuple[str, ...] = ()
    """Ids of samples that were left out because their loss was not finite."""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step (dropout) follow from seed, step and worker: a resumed run draws the same."""
    import torch

    torch.manual_seed(hash((seed, step, rank)) & 0x7FFF_FFFF_FFFF_FFFF)


def training_step(
    engine: Any, batches: Sequence[Batch], *, step: int, on_non_finite: Literal["stop", "skip"] = "stop"
) -> StepResult:
    """Run one optimizer step; all workers call it.

    DeepSpeed averages gradients over workers, and micro-batches hold different numbers of supervised tokens: each
    scales its sum so that what comes out is the gradient of the mean over the step's supervised tokens, however many
    workers and micro-batches share them.

    A micro-batch that is left out adds nothing to the gradient, which is not scaled up for it. A step whose gradients
    are not finite is left out whole.

    Raises:
        TrainingError: a loss or a gradient is not finite, and `on_non_finite` says stop; the message names the samples.
    """
    import torch
    import torch.distributed as dist

    world, device = dist.get_world_size(), engine.device
    counts = torch.tensor(
        [
            sum(batch.n_supervised for batch in batches),
            sum(batch.n_tokens for batch in batches),
            sum(batch.n_read for batch in batches),
            sum(len(batch.ids) for batch in batches),
            sum(batch.n_images for batch in batches),
        ],
        dtype=torch.float64 if device.type == "cpu" else torch.float32,
        device=device,
    )
    rounds = torch.tensor(len(batches), device=device)
    dist.all_reduce(counts)
    dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
    supervised, tokens, read, samples, images = (int(count) for count in counts.tolist())
    total, unlearned = torch.zeros((), device=device), torch.zeros((), device=device)
    skipped: list[str] = []
    for i in range(int(rounds)):
        batch = (batches[i] if i < len(batches) else blank_batch()).to(device)
        engine.set_gradient_accumulation_boundary(i + 1 == int(rounds))
        loss = _forward(engine, batch)
        broken = ~torch.isfinite(loss.detach())
        anywhere = broken.float()
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        if anywhere.item():
            ids = _of_all_workers(batch.ids if broken.item() else (), world)
            if on_non_finite == "stop":
                raise TrainingError(
                    f"step {step}: the loss is not finite in a batch of {', '.join(ids[:8])}: lower the learning "
                    "rates, look at these samples, or set 'on_non_finite: skip'"
                )
            skipped += ids
            unlearned += batch.n_supervised * broken.item()
            # All run it again, for at ZeRO's stage 3 every forward pass is one of all workers.
            loss = _forward(engine, blank_batch().to(device) if broken.item() else batch)
        total += loss.detach()
        engine.backward(loss * (world / supervised), scale_wrt_gas=False)
    norm = _step(engine)
    dist.all_reduce(total)
    dist.all_reduce(unlearned)
    if not math.isfinite(norm):
        ids = _of_all_workers([id for batch in batches for id in batch.ids], world)
        if on_non_finite == "stop":
            raise TrainingError(
                f"step {step}: gradients are not finite, of {', '.join(ids[:8])}: lower the learning rates, look at "
                "these samples, or set 'on_non_finite: skip'"
            )
        skipped += [id for id in ids if id not in skipped]
    return StepResult(
        loss=float(total) / (supervised - int(unlearned)) if unlearned < supervised else math.nan,
        grad_norm=norm,
        tokens=tokens,
        read=read,
        supervised=supervised,
        samples=samples,
        images=images,
        skipped=tuple(skipped),
    )


def _forward(engine: Any, batch: Batch) -> Any:
    return engine(batch.input_ids, batch.attention_mask, batch.labels, batch.features, batch.packing, batch.pixels)


def _step(engine: Any) -> float:
    """Move the parameters, unless gradients are not finite; the norm of all gradients before clipping."""
    import torch

    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():  # there DeepSpeed looks at nothing
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            engine.step()
        else:
            engine.zero_grad()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm())


def _of_all_workers(ids: Sequence[str], world: int) -> list[str]:
    """Ids of samples, put together."""
    import torch.distributed as dist

    found: list[Any] = [None] * world
    dist.all_gather_object(found, list(ids))
    return [id for of_worker in found for id in of_worker]
