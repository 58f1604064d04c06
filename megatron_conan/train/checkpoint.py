"""Loading checkpoints of megatron-core's dist_checkpointing: saved under one layout, loaded under any other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_conan.config import RunConfig
from megatron_conan.model.conan import ConanModel
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.checkpoint_files import (
    find_checkpoint,
    find_damage,
    find_damage_beside,
    is_readable,
    read_state,
    saved_checkpoints,
)
from megatron_conan.train.optimizer_state import OPTIMIZER_SHARDING, load_optimizer_state, sharded_optimizer_state

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


def whole_checkpoint(run_dir: Path, context: ParallelContext) -> Path | None:
    """The run's newest checkpoint whose files are as they were written; None if it has none. All ranks must call.

    Raises:
        ValueError: if all are damaged.
    """
    box: list[Any] = [[folder.name for folder in saved_checkpoints(run_dir)]]
    dist.broadcast_object_list(box, src=0, group=context.world_group, device=context.device)
    folders = [run_dir / "checkpoints" / name for name in box[0]]
    damaged: list[tuple[str, str]] = []
    for folder in folders:
        damage = damage_of(folder, context) or _damage_beside(folder, context)
        if not damage:
            for name, what in damaged if context.rank == 0 else []:
                print(
                    f"warning: checkpoint {name} is damaged, {folder.name} is used: {what}", file=sys.stderr, flush=True
                )
            return folder
        damaged.append((folder.name, "; ".join(damage)))
    if damaged:
        told = ". ".join(f"{name}: {what}" for name, what in damaged)
        raise ValueError(
            f"all checkpoints of {run_dir} are damaged. {told}. Bring one back from a copy, or remove the folder checkpoints "
            "to start from the beginning"
        )
    return None


def damage_of(folder: Path, context: ParallelContext) -> list[str]:
    """What is wrong with a checkpoint's files, the same on all ranks, which read a share each. All ranks must call."""
    parts: list[Any] = [None] * context.world_size
    dist.all_gather_object(parts, find_damage(folder, context.rank, context.world_size), group=context.world_group)
    return [what for part in parts for what in part]


def _damage_beside(folder: Path, context: ParallelContext) -> list[str]:
    """`find_damage_beside` as rank 0 sees it. All ranks must call."""
    box = [find_damage_beside(folder) if context.rank == 0 else []]
    dist.broadcast_object_list(box, src=0, group=context.world_group, device=context.device)
    return box[0]


def load_checkpoint(
    folder: Path, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer
) -> dict[str, Any]:
    """Load weights and optimizer in place. All ranks must call.

    Returns:
        The `state` given to `Checkpointer.save`, with `step`.
    """
    sharded = sharded_state(chunks, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(sharded, str(folder))
    _load_model_state(loaded, chunks)
    load_optimizer_state(optimizer, loaded["optimizer"])
    return read_state(folder)


def load_weights(folder: Path, chunks: list[ConanModel], context: ParallelContext) -> None:
    """Load weights only, for a stage that starts from another one's end. All ranks must call.

    Parameters that the checkpoint holds and the model lacks (theta of a learned soft mask) are left out; those that start in
    this stage keep their start.

    Raises:
        ValueError: if the checkpoint is damaged.
    """
    if damage := damage_of(folder, context):
        raise ValueError(
            f"checkpoint {folder} is damaged: {'; '.join(damage)}. Name another one, or bring it back from a copy"
        )
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


def sharded_state(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, is_loading: bool
) -> dict[str, Any]:
    """Weights and optimizer of this rank, as megatron-core saves and loads them."""
    metadata = dict(OPTIMIZER_SHARDING)
    sharded: dict[str, Any] = {
        _model_key(i, chunks): unwrap(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)
    }
    sharded["optimizer"] = sharded_optimizer_state(optimizer, sharded, is_loading)
    return sharded


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
    own = [folder for folder in saved_checkpoints(config.run_dir) if is_readable(folder)]
    if own:
        folder = own[0]
    elif config.checkpoint.init_from is not None:
        folder = find_checkpoint(config.checkpoint.init_from)
    else:
        return
    state = read_state(folder)
    if own and state["step"] > config.train.steps:
        raise ValueError(
            f"{config.run_dir} stands at step {state['step']}, beyond train.steps={config.train.steps}: raise it, or write an "
            "earlier checkpoint's name into checkpoints/latest"
        )
    if not own and folder != config.checkpoint.init_from and state["step"] < state["steps"]:
        raise ValueError(
            f"checkpoint.init_from={config.checkpoint.init_from} is a run that stands at step {state['step']} of "
            f"{state['steps']}: let it end first (the same command goes on), or name the checkpoint {folder} itself"
        )
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
