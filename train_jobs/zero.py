"""DeepSpeed around a model: what ZeRO shares, and one optimizer over the parts that a recipe trains.

In: a `MultimodalLM` whose trained parameters require gradients, and a `Recipe`. Out: a DeepSpeed engine, whose
optimizer has a group for each trained part. Does not know data, steps or checkpoints.
"""

import os
from typing import TYPE_CHECKING, Any

from mmllm_core.config import Recipe

if TYPE_CHECKING:
    from mmllm_core.model import MultimodalLM

BETAS = (0.9, 0.99)


def import_deepspeed(device: str) -> Any:
    """DeepSpeed for models on `device` ("cpu" or "cuda"), which compiles nothing for CPUs.

    Of itself it takes a Mac's GPU, whatever the model is on, and compiles its shared-memory collective as processes
    join, with a compiler that there need not be; only tensor-parallel inference calls that one
    (`TorchBackend.inference_all_reduce` of `deepspeed.comm.torch`).
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read as it is imported
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def initialise_deepspeed(model: "MultimodalLM", recipe: Recipe) -> Any:
    """Wrap a model; every worker does so at the same time.

    From stage 2 on, gradients of a step's micro-batches are added up in float32, so that how a step is cut changes
    rounding alone; below that DeepSpeed adds them up in the dtype that the model computes with.
    """
    import torch

    deepspeed = import_deepspeed(model.causal_lm.device.type)
    groups: list[dict[str, Any]] = [
        {"params": list(model.parameters_of(part)), "name": part, "lr": 0.0, "weight_decay": recipe.weight_decay}
        for part in recipe.trained
    ]
    n_trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    bf16 = model.connector.dtype == torch.bfloat16
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(groups, recipe, model.causal_lm.device.type),
        config={
            "train_micro_batch_size_per_gpu": recipe.micro_batch,
            "gradient_clipping": recipe.max_grad_norm,
            "bf16": {"enabled": bf16},
            "data_types": {"grad_accum_dtype": "fp32" if bf16 and recipe.zero.stage >= 2 else None},
            "zero_optimization": zero_config(recipe, n_trained),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return engine


def reduce_bucket(n_trained: int) -> int:
    """Gradients that are exchanged at once: all, for DeepSpeed makes room for its own 500 million even where a LoRA
    adapter has a few million; but no more than those."""
    return min(max(n_trained, 1024), 500_000_000)


def zero_config(recipe: Recipe, n_trained: int) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` section.

    Args:
        n_trained: trained parameters.
    """
    zero = recipe.zero
    values: dict[str, Any] = {"stage": zero.stage, "reduce_bucket_size": reduce_bucket(n_trained)}
    if zero.offload_optimizer:
        values["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_parameters:
        values["offload_param"] = {"device": "cpu"}
    return values


def _optimizer(groups: list[dict[str, Any]], recipe: Recipe, device: str) -> Any:
    import torch

    if recipe.zero.offload_optimizer and device != "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, betas=BETAS, adamw_mode=True)
    return torch.optim.AdamW(groups, betas=BETAS)
