"""Checkpoints through megatron-core's dist_checkpointing: saved under one layout, loaded under any other.

    checkpoints/step_00000100/   sharded model and optimizer, common.pt, conan.json
    checkpoints/latest           name of the newest whole checkpoint

A checkpoint is written to a temporary name, renamed, and only then named by `latest`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_conan.config import RunConfig
from megatron_conan.model.conan import ConanModel
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.run_folder import latest_checkpoint, write_atomically

OPTIMIZER_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}

SHAPE_KEYS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
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
    sharded = _sharded_state(chunks, optimizer, is_loading=False)
    dist_checkpointing.save(sharded, str(temporary), content_metadata=dict(OPTIMIZER_SHARDING))
    context.barrier()
    if context.rank == 0:
        write_atomically(temporary / "conan.json", json.dumps({"step": step, **state}, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        write_atomically(folder.parent / "latest", folder.name + "\n")
        for old in sorted(folder.parent.glob("step_*"))[:-keep_last]:
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
    sharded = _sharded_state(chunks, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(sharded, str(folder))
    _load_model_state(loaded, chunks)
    optimizer.load_state_dict(loaded["optimizer"])
    return read_state(folder)


def load_weights(folder: Path, chunks: list[ConanModel]) -> None:
    """Load weights only, for a stage that starts from another one's end. All ranks must call.

    Parameters that the checkpoint holds and the model lacks (theta of a learned soft mask) are left out.
    """
    sharded = {_model_key(i, chunks): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    for state in sharded.values():
        for name in [name for name in state if name.endswith("core_attention.theta")]:
            del state[name]  # exists in stage weak only and starts there
    loaded = dist_checkpointing.load(sharded, str(folder))
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[_model_key(i, chunks)], strict=False)
        missing = [name for name in missing if not name.endswith(("core_attention.theta", "output_layer.weight"))]
        assert not missing, missing
        assert not unexpected, unexpected


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `checkpoint.init_from` names: a run folder (its latest) or a step_* folder itself.

    Raises:
        ValueError: if there is none.
    """
    if (path / "conan.json").exists():
        return path
    folder = latest_checkpoint(path)
    if folder is None:
        raise ValueError(
            f"{path} holds no checkpoint (neither checkpoints/latest nor conan.json is there): run the stage that makes it "
            "first, or set checkpoint.init_from=null to start from random weights"
        )
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """The small state saved with a checkpoint."""
    return json.loads((folder / "conan.json").read_text(encoding="utf-8"))


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


def _load_model_state(loaded: dict[str, Any], chunks: list[DistributedDataParallel]) -> None:
    for i, chunk in enumerate(chunks):
        with torch.no_grad():
            unwrap(chunk).load_state_dict(loaded[_model_key(i, chunks)], strict=False)


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
    mask = config.soft_mask
    if (
        config.stage == "finetune"
        and state["stage"] == "weak"
        and (mask.schedule, mask.alpha) != ("constant", state["alpha"])
    ):
        raise ValueError(
            f"{folder} ended stage weak with the soft mask at alpha={state['alpha']}, but finetune would train with "
            f"soft_mask.schedule={mask.schedule}, alpha={mask.alpha}; set soft_mask.schedule=constant "
            f"soft_mask.alpha={state['alpha']}"
        )
    now = config.model.model_dump()
    differences = [
        f"{key}: {state['model'][key]} there, {now[key]} here" for key in SHAPE_KEYS if state["model"][key] != now[key]
    ]
    if differences:
        raise ValueError(
            f"{folder} holds a model of another shape: {'; '.join(differences)}; use the same model section"
        )
