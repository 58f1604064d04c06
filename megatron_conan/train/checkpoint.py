"""Checkpoints through megatron-core's dist_checkpointing: saved under one layout, loaded under any other.

    checkpoints/step_00000100/   sharded model and optimizer, common.pt, conan.json
    checkpoints/latest           name of the newest whole checkpoint

A checkpoint is written to a temporary name, renamed, and only then named by `latest`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

from megatron_conan.config import RunConfig
from megatron_conan.model.conan import ConanModel
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.checkpoint_files import find_checkpoint, latest_checkpoint, read_state
from megatron_conan.train.run_folder import write_atomically

OPTIMIZER_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}

SHAPE_KEYS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "ffn_hidden_size",
    "vocab_size",
    "rotary_base",
    "norm_epsilon",
)
"""Fields of the model section that weights depend on."""


def save_checkpoint(
    run_dir: Path,
    step: int,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    state: dict[str, Any],
    context: ParallelContext,
    keep_last: int,
) -> Path:
    """Save weights, optimizer and `state` after `step`. All ranks must call.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        chunks: this rank's model chunks.
        optimizer: their optimizer.
        state: small JSON values that describe the run at this step, the same on every rank.
        context: this rank's place.
        keep_last: older checkpoints beyond this many are removed.

    Returns:
        The checkpoint's folder.
    """
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    if context.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    context.barrier()
    # Results of the writing stay in this process. megatron-core's queue is a process of its own, which lives on when this one
    # is killed, and keeps the run's output open: `... | tee` would never end.
    filesystem_async._results_queue = SimpleQueue()
    sharded = _sharded_state(chunks, optimizer, is_loading=False)
    dist_checkpointing.save(sharded, str(temporary), content_metadata=dict(OPTIMIZER_SHARDING))
    context.barrier()
    if context.rank == 0:
        write_atomically(temporary / "conan.json", json.dumps({"step": step, **state}, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        write_atomically(folder.parent / "latest", folder.name + "\n")
        earlier = sorted(old for old in folder.parent.glob("step_*") if old.name <= folder.name)
        for old in earlier[:-keep_last]:
            shutil.rmtree(old)
    context.barrier()
    return folder


def load_checkpoint(
    folder: Path, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer
) -> dict[str, Any]:
    """Load weights and optimizer in place. All ranks must call.

    Returns:
        The `state` given to `save_checkpoint`, with `step`.
    """
    _create_adam_state(optimizer)
    sharded = _sharded_state(chunks, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(sharded, str(folder))
    _load_model_state(loaded, chunks)
    _load_optimizer_state(optimizer, loaded["optimizer"])
    return read_state(folder)


def load_weights(folder: Path, chunks: list[ConanModel]) -> None:
    """Load weights only, for a stage that starts from another one's end. All ranks must call.

    Parameters that the checkpoint holds and the model lacks (theta of a learned soft mask) are left out; those that start in
    this stage keep their start.
    """
    starting = ["core_attention.theta"]  # exists in stage weak only
    if read_state(folder).get("projection_dim") is None:
        starting.append("projection.weight")  # language models have none
    sharded = {_model_key(i, chunks): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    for state in sharded.values():
        for name in [name for name in state if name.endswith(tuple(starting))]:
            del state[name]
    loaded = dist_checkpointing.load(sharded, str(folder))
    _load_model_state(loaded, chunks)


def unwrap(chunk: torch.nn.Module) -> ConanModel:
    """The model under megatron-core's data-parallel and precision wrappers."""
    while not isinstance(chunk, ConanModel):
        chunk = chunk.get_submodule("module")
    return chunk


def _model_key(i: int, chunks: list[Any]) -> str:
    return "model" if len(chunks) == 1 else f"model{i}"


def _sharded_state(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, is_loading: bool
) -> dict[str, Any]:
    metadata = dict(OPTIMIZER_SHARDING)
    sharded: dict[str, Any] = {
        _model_key(i, chunks): unwrap(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)
    }
    sharded["optimizer"] = optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=metadata)
    return sharded


def _create_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give a fresh sharded optimizer its state tensors, for the checkpoint's values to be loaded into.

    Without apex and transformer-engine megatron-core 0.16.1 asks the state for its step before anything is loaded
    (distrib_optimizer.py, `assert len(steps) == 1`).
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(part, DistributedOptimizer) or part.optimizer.state:
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load, around what megatron-core 0.16.1 gets wrong for a sharded optimizer without apex and transformer-engine.

    It copies torch Adam's `step` from a source that has none, and gives all parameters one step tensor, which would then
    be counted up once a parameter.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if HAVE_APEX_OR_TE or len(parts) != 1 or not isinstance(parts[0], DistributedOptimizer):
        optimizer.load_state_dict(state)
        return
    (part,) = parts
    parameter_state = state.pop("param_state")
    part.load_state_dict(state)
    steps = [values.pop("step").clone() for values in part.optimizer.state.values()]
    part.load_parameter_state_from_fully_reshardable(parameter_state)
    for values, step in zip(part.optimizer.state.values(), steps, strict=True):
        values["step"] = step


def _load_model_state(loaded: dict[str, Any], chunks: list[Any]) -> None:
    """Copy loaded tensors into the chunks; only what starts in this stage and the tied head may be missing."""
    optional = ("core_attention.theta", "output_layer.weight", "projection.weight")
    for i, chunk in enumerate(chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[_model_key(i, chunks)], strict=False)
        missing = [name for name in missing if not name.endswith(optional)]
        assert not missing, missing
        assert not unexpected, unexpected


def check_start(config: RunConfig, tokenizer_sha256: str) -> None:
    """Refuse a start from weights of another shape or tokenizer. Reads only; any rank may call.

    Raises:
        ValueError: what differs, and the remedy.
    """
    folder = latest_checkpoint(config.run_dir)
    if folder is None and config.checkpoint.init_from is not None:
        folder = find_checkpoint(config.checkpoint.init_from)
    if folder is None:
        return
    state = read_state(folder)
    if state["tokenizer_sha256"] != tokenizer_sha256:
        raise ValueError(
            f"{folder} was trained with another tokenizer (sha256 {state['tokenizer_sha256'][:12]}) than "
            f"{config.tokenizer.model} ({tokenizer_sha256[:12]}); set tokenizer.model to that one, or start from random weights"
        )
    if config.stage == "finetune" and state["stage"] == "weak":
        _check_mask(config, folder, state)
    if state["stage"] in ("weak", "finetune") and state.get("projection_dim") != config.pooling.projection_dim:
        raise ValueError(
            f"{folder} was trained with pooling.projection_dim={state.get('projection_dim')}, not "
            f"{config.pooling.projection_dim}; set it to that"
        )
    now = shape_fields(config)
    differences = [
        f"{key}: {state['model'][key]} there, {now[key]} here" for key in SHAPE_KEYS if state["model"][key] != now[key]
    ]
    if differences:
        raise ValueError(
            f"{folder} holds a model of another shape: {'; '.join(differences)}; use the same model section"
        )


def shape_fields(config: RunConfig) -> dict[str, Any]:
    """The fields of the model section that weights depend on."""
    values = {**config.model.model_dump(), "head_dim": config.model.head_dim}
    return {key: values[key] for key in SHAPE_KEYS}


def _check_mask(config: RunConfig, folder: Path, state: dict[str, Any]) -> None:
    """finetune runs with the mask at which weak ended; the form matters only where the mask is half open."""
    mask, alpha, form = config.soft_mask, state["alpha"], state["soft_mask_form"]
    if (mask.schedule, mask.alpha) != ("constant", alpha) or (0.0 < alpha < 1.0 and mask.form != form):
        raise ValueError(
            f"{folder} ended stage weak with the soft mask of form={form} at alpha={alpha}, but finetune would train with "
            f"form={mask.form}, schedule={mask.schedule}, alpha={mask.alpha}; set soft_mask.form={form} "
            f"soft_mask.schedule=constant soft_mask.alpha={alpha}"
        )
