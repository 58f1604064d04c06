"""The optimizer's part of a checkpoint, in one form for every layout.

megatron-core 0.16.1 names and nests the state of an optimizer that is sharded over data-parallel ranks otherwise than
that of a replicated one, and can load neither as the other. Here both are saved as `exp_avg`, `exp_avg_sq` and, where weights
are bf16, `fp32_param` of every parameter, split as the parameter is, and Adam's count of steps. Parameter groups are not
saved: they follow from the config, which stays the same, and the schedule.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

OPTIMIZER_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """Adam's state of this rank's parameters, as megatron-core saves and loads tensors. All ranks must call.

    Args:
        optimizer: the chunks' optimizer.
        model: the chunks' sharded state.
        is_loading: the tensors will be loaded into.

    Returns:
        `exp_avg`, `exp_avg_sq`, in bf16 `fp32_param`: number of the parameter on this rank -> sharded tensor; and `step`.
    """
    part = _only_part(optimizer)
    _create_adam_state(part)
    state = part.sharded_state_dict(model, is_loading=is_loading, metadata=dict(OPTIMIZER_SHARDING))
    found: dict[str, Any] = {"exp_avg": {}, "exp_avg_sq": {}}
    if isinstance(part, DistributedOptimizer):
        groups, tensors = state["optimizer"]["param_groups"], state["param_state"]
        step = groups[0].get("step", 0)
        if part.config.bf16:
            found["fp32_param"] = {i: _renamed(tensors[i]["param"]) for i in tensors}
    else:
        inner = state["optimizer"] if part.config.bf16 else state
        groups, tensors = inner["param_groups"], dict(inner["state"])
        step = tensors.pop("common_step", groups[0].get("step", 0))
        if part.config.bf16:
            found["fp32_param"] = dict(enumerate(chain.from_iterable(state["fp32_from_fp16_params"])))
    for kind in ("exp_avg", "exp_avg_sq"):
        found[kind] = {i: tensors[i][kind] for i in tensors}
    return {**found, "step": float(step)}


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Take over what `sharded_optimizer_state` gave, with the tensors loaded; the model must have its weights already."""
    part, step = _only_part(optimizer), state["step"]
    # by group count the optimizers of apex and transformer-engine, by parameter torch's
    groups = [{**group, "step": int(step)} for group in part.optimizer.state_dict()["param_groups"]]
    tensors = {i: {kind: state[kind][i] for kind in ("exp_avg", "exp_avg_sq")} for i in state["exp_avg"]}
    if isinstance(part, DistributedOptimizer):
        parameters = chain.from_iterable(buffer.param_index_map for buffer in part.buffers)
        for i, parameter in enumerate(parameters):
            tensors[i]["param"] = state["fp32_param"][i] if part.config.bf16 else parameter.detach()
        _load_sharded(part, groups, tensors)
        return
    count = {} if HAVE_APEX_OR_TE else {"common_step": torch.tensor(step)}
    inner = {"state": {**tensors, **count}, "param_groups": groups}
    if not part.config.bf16:
        part.load_state_dict(inner)
        return
    weights = iter(state["fp32_param"][i] for i in sorted(state["fp32_param"]))
    by_group = [[next(weights) for _ in group] for group in part.fp32_from_float16_groups]
    part.load_state_dict({"optimizer": inner, "fp32_from_fp16_params": by_group})


def _load_sharded(part: DistributedOptimizer, groups: list[dict[str, Any]], tensors: dict[int, Any]) -> None:
    """Load, around what megatron-core 0.16.1 gets wrong without apex and transformer-engine.

    It copies torch Adam's `step` from a source that has none, and gives all parameters one step tensor, which would then
    be counted up once a parameter.
    """
    part.load_state_dict({"optimizer": {"param_groups": groups}})
    states = [] if HAVE_APEX_OR_TE else list(part.optimizer.state.values())
    steps = [values.pop("step").clone() for values in states]
    part.load_parameter_state_from_fully_reshardable(tensors)
    for values, step in zip(states, steps, strict=True):
        values["step"] = step


def _only_part(optimizer: MegatronOptimizer) -> Any:
    """The optimizer that megatron-core chains with none."""
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return part


def _renamed(tensor: Any) -> Any:
    """The fp32 copy of a bf16 weight, under the name that it has for a replicated optimizer."""
    return replace(tensor, key=tensor.key.replace("optimizer.state.param.", "optimizer.state.fp32_param.", 1))


def _create_adam_state(part: Any) -> None:
    """Give an optimizer that has taken no step its state tensors: to load into, or to save where all steps were skipped.

    megatron-core 0.16.1 would ask a sharded one's for its step (distrib_optimizer.py, `assert len(steps) == 1`), and leaves the
    step out of a replicated one's, which torch's Adam then misses.
    """
    if part.optimizer.state:
        return
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            part.optimizer.state[parameter] = {
                **({} if HAVE_APEX_OR_TE else {"step": torch.zeros(())}),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
