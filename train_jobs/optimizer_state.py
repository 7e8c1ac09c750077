"""What training moved, as whole tensors by parameter: the same whatever ZeRO stage and number of workers made them.

In: a DeepSpeed engine. Out: for each trained parameter its float32 weights and Adam moments; and the way back. This is
what DeepSpeed's universal checkpoints (arXiv:2406.18820) hold as well, which are pickles; these tensors go to
safetensors. All workers take part in either way. Does not know files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmllm_core.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainedState:
    """Float32 tensors on CPU by parameter name, in the shapes of the parameters."""

    weights: dict[str, "Tensor"]
    moments: dict[str, dict[str, "Tensor"]]
    """By moment (`MOMENTS`) and name."""
    adam_steps: int
    """Optimizer steps that the moments have seen."""


def gather(engine: Any, *, keep: bool, moments: bool = True) -> TrainedState | None:
    """Collect the state, parameter by parameter.

    Args:
        keep: whether this worker wants it; the others take part and get None.
        moments: whether Adam's are wanted too, or the weights alone.

    Raises:
        TrainingError: before the first optimizer step, when there are no moments yet.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    steps = _adam_steps(engine)
    _link_moments(engine)
    weights: dict[str, Tensor] = {}
    wanted = MOMENTS if moments else ()
    by_moment: dict[str, dict[str, Tensor]] = {moment: {} for moment in wanted}
    plain = _unsharded(engine)
    for name, parameter in _trained(engine):
        if plain is not None:
            master = plain[parameter]
            found = [master, *(_inner(engine).state[master][moment] for moment in wanted)]
        else:
            found = [
                safe_get_full_fp32_param(parameter),
                *(safe_get_full_optimizer_state(parameter, moment) for moment in wanted),
            ]
        if keep:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = [tensor.detach().float().reshape(shape).cpu().clone() for tensor in found]
            weights[name] = whole[0]
            for moment, tensor in zip(wanted, whole[1:], strict=True):
                by_moment[moment][name] = tensor
    return TrainedState(weights, by_moment, steps) if keep else None


def scatter(engine: Any, state: TrainedState) -> None:
    """Put a state into a freshly initialised engine, whose model holds `state.weights` already.

    The weights that the model computes with were rounded from the float32 ones; loading them before DeepSpeed copied
    them, and the float32 ones here, leaves both as they were.
    """
    import torch
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _make_moments(engine, state.adam_steps)
    plain = _unsharded(engine)
    for name, parameter in _trained(engine):
        values = [state.weights[name], *(state.moments[moment][name] for moment in MOMENTS)]
        if plain is not None:
            master = plain[parameter]
            with torch.no_grad():
                master.copy_(values[0])
                for moment, value in zip(MOMENTS, values[1:], strict=True):
                    _inner(engine).state[master][moment].copy_(value)
            continue
        device = engine.device
        safe_set_full_fp32_param(parameter, values[0].to(device))
        for moment, value in zip(MOMENTS, values[1:], strict=True):
            safe_set_full_optimizer_state(parameter, value.to(device), moment)


def _trained(engine: Any) -> Iterator[tuple[str, "nn.Parameter"]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _inner(engine: Any) -> Any:
    """The optimizer beneath what DeepSpeed wraps around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _unsharded(engine: Any) -> dict["nn.Parameter", "Tensor"] | None:
    """Without ZeRO: the float32 tensor that the optimizer moves for each parameter; the parameter itself in float32."""
    if engine.zero_optimization_stage() > 0:
        return None
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups"):
        return {
            low: high
            for lows, highs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
    return {parameter: parameter for _, parameter in _trained(engine)}


def _moved(engine: Any) -> list["Tensor"]:
    """The tensors that the optimizer moves: parameters, or this worker's flat pieces of them."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(wrapper.fp32_partitioned_groups_flat)
    return [tensor for group in _inner(engine).param_groups for tensor in group["params"]]


def _adam_steps(engine: Any) -> int:
    steps = {int(state["step"]) for state in _inner(engine).state.values() if "step" in state}
    if len(steps) != 1:
        raise TrainingError("there is no optimizer state to save before the first step")
    return steps.pop()


def _make_moments(engine: Any, steps: int) -> None:
    """Adam makes its moments in its first step; here they must be there before."""
    import torch

    inner = _inner(engine)
    for tensor in _moved(engine):
        made: dict[str, Any] = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
        counts_in_tensor = isinstance(inner, torch.optim.AdamW)
        inner.state[tensor] = made | {"step": torch.tensor(float(steps)) if counts_in_tensor else steps}
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Let DeepSpeed find the moments of all groups; it links them when it has stepped the first group alone."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
