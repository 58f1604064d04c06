"""The training loop: the same for every stage."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from megatron_conan.model.conan import build_model
from megatron_conan.model.mask import SoftMask
from megatron_conan.train.checkpoint import (
    load_checkpoint,
    load_weights,
    save_checkpoint,
    shape_fields,
)
from megatron_conan.train.checkpoint_files import find_checkpoint, latest_checkpoint
from megatron_conan.train.metrics import MetricsWriter, memory_gib
from megatron_conan.train.optim import build_optimizer, wrap_for_training
from megatron_conan.train.run_folder import open_run_folder
from megatron_conan.train.setup import Setup
from megatron_conan.train.stages import STAGES, StageParts
from megatron_conan.train.step import train_step


class Hook(Protocol):
    """Something that happens between steps: mining, evaluation. All ranks call all hooks."""

    def before_step(self, trainer: Trainer, step: int) -> dict[str, float]:
        """Called before step `step` (from 1) with the mask already at its value; returns metrics of the step."""

    def after_training(self, trainer: Trainer) -> None:
        """Called once after the last step."""

    def state(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """What a checkpoint must remember; the same on all ranks."""

    def restore(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Take over what `state` gave, on resume."""


@dataclass
class Trainer:
    """A run in memory."""

    setup: Setup
    parts: StageParts
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    soft_mask: SoftMask
    hooks: dict[str, Hook] = field(default_factory=dict)
    step: int = 0
    """Optimizer steps done."""


def build_trainer(setup: Setup, hooks: dict[str, Hook]) -> Trainer:
    """Build data, model and optimizer, and load weights: the run's own checkpoint, else `checkpoint.init_from`.

    All ranks must call.
    """
    config, context = setup.config, setup.context
    stage = STAGES[config.stage]
    parts = stage.build(setup)  # refuses data that does not fit, before anything is written
    if context.rank == 0:
        open_run_folder(config, context.world_size)
    context.barrier()
    soft_mask = SoftMask(config.soft_mask, config.train.steps, context.device)
    chunks, core = build_model(config, context.device, soft_mask, stage.head)
    resume_from = latest_checkpoint(config.run_dir)
    if resume_from is None and config.checkpoint.init_from is not None:
        load_weights(find_checkpoint(config.checkpoint.init_from), chunks)
    wrapped = wrap_for_training(chunks, core, config)
    optimizer, scheduler = build_optimizer(wrapped, core, config)
    trainer = Trainer(setup, parts, wrapped, optimizer, scheduler, soft_mask, hooks)
    if resume_from is not None:
        state = load_checkpoint(resume_from, wrapped, optimizer)
        trainer.step = state["step"]
        scheduler.step(trainer.step)
        soft_mask.at_step(trainer.step)  # a finished run evaluates without another step
        for name, hook in hooks.items():
            hook.restore(trainer, state["hooks"].get(name, {}))
    return trainer


def train(trainer: Trainer) -> dict[str, float]:
    """Run to the last step, writing metrics and checkpoints. All ranks must call.

    Returns:
        The last step's metrics; empty if there was nothing left to do.
    """
    config, context = trainer.setup.config, trainer.setup.context
    writer = None
    if context.rank == 0:
        writer = MetricsWriter(config.run_dir, config.stage, config.train.steps, trainer.step)
    values: dict[str, float] = {}
    try:
        while trainer.step < config.train.steps:
            values = one_step(trainer)
            logged = trainer.step % config.train.log_every == 0 or trainer.step in (1, config.train.steps)
            if writer is not None and logged:
                writer.write(trainer.step, values)
            _save_if_due(trainer)
        for hook in trainer.hooks.values():
            hook.after_training(trainer)
    finally:
        if writer is not None:
            writer.close()
    return values


def one_step(trainer: Trainer) -> dict[str, float]:
    """One step: hooks, data, forward, backward, update. All ranks must call. Returns the step's metrics."""
    setup = trainer.setup
    step = trainer.step + 1
    alpha = trainer.soft_mask.at_step(step)
    hook_values: dict[str, float] = {}
    for hook in trainer.hooks.values():
        hook_values.update(hook.before_step(trainer, step))
    started = time.monotonic()
    batch = trainer.parts.data.batch(step)
    data_seconds = time.monotonic() - started
    trainer.scheduler.step(1)
    forward_backward = partial(trainer.parts.forward_backward, trainer.chunks, batch)
    values = train_step(trainer.chunks, trainer.optimizer, forward_backward, setup.context)
    trainer.step = step
    seconds = time.monotonic() - started
    timing = {
        "tokens_per_second": values["tokens"] / seconds,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "memory_gib": memory_gib(setup.context.device),
    }
    mask = {"alpha": alpha} if setup.config.is_contrastive else {}
    first = {"loss": values.pop("loss"), "lr": get_canonical_lr_for_logging(trainer.optimizer.param_groups) or 0.0}
    return {**first, **values, **timing, **mask, **hook_values}


def _save_if_due(trainer: Trainer) -> None:
    config, step = trainer.setup.config, trainer.step
    every = config.checkpoint.every
    if step != config.train.steps and (every is None or step % every):
        return
    state = {
        "stage": config.stage,
        "alpha": trainer.soft_mask.value,
        "soft_mask_form": config.soft_mask.form,
        "model": shape_fields(config),
        "projection_dim": config.pooling.projection_dim,
        "tokenizer_sha256": trainer.setup.tokenizer.sha256,
        "hooks": {name: hook.state(trainer, step) for name, hook in trainer.hooks.items()},
    }
    save_checkpoint(
        config.run_dir,
        step,
        trainer.chunks,
        trainer.optimizer,
        state,
        trainer.setup.context,
        config.checkpoint.keep_last,
    )
