"""The training loop: the same for every stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from megatron_conan.data.blending import mix_metrics
from megatron_conan.data.fingerprint import Fingerprints, check_same_data, data_fingerprints
from megatron_conan.data.packing import PackedTexts
from megatron_conan.model.conan import build_model
from megatron_conan.model.mask import SoftMask
from megatron_conan.parallel.context import ParallelContext
from megatron_conan.train.checkpoint import load_checkpoint, load_weights, shape_fields, whole_checkpoint
from megatron_conan.train.checkpoint_files import find_checkpoint, read_state
from megatron_conan.train.checkpoint_saving import Checkpointer
from megatron_conan.train.dry_run import dry_run
from megatron_conan.train.flops import peak_flops, step_flops
from megatron_conan.train.metrics import MetricsWriter, memory_gib, phase_seconds
from megatron_conan.train.mix import tell_mix, tell_realised
from megatron_conan.train.optim import build_optimizer, wrap_for_training
from megatron_conan.train.phases import Phases
from megatron_conan.train.profiling import ProfilerWindow
from megatron_conan.train.run_folder import open_run_folder
from megatron_conan.train.setup import Setup
from megatron_conan.train.skipping import SkippedSteps, is_finite, save_batch
from megatron_conan.train.stages import STAGES, StageParts
from megatron_conan.train.step import embed_texts, train_step
from megatron_conan.train.stopping import StopRequest, stop_file
from megatron_conan.train.watchdog import Watchdog


class Hook(Protocol):
    """Something that happens between steps: mining, evaluation. All ranks call all hooks."""

    def before_step(self, trainer: Trainer, step: int) -> dict[str, float]:
        """Called before step `step` (from 1) with the mask already at its value; returns metrics of the step."""

    def after_training(self, trainer: Trainer) -> None:
        """Called once after the last step."""

    def state(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """What a checkpoint must remember, as JSON; rank 0's is saved. All ranks call.

        `sums`, if there are any, tell the SHA-256 of files in the run's folder without which the checkpoint is damaged.
        """

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
    data: Fingerprints
    """Of the files that the run trains on."""
    hooks: dict[str, Hook] = field(default_factory=dict)
    step: int = 0
    """Steps done."""
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    phases: Phases = field(default_factory=Phases)

    def embed(self, micro_batches: Sequence[PackedTexts]) -> torch.Tensor:
        """`embed_texts` by the live weights, with a sign of life."""
        self.phases.touch()
        return embed_texts(self.chunks, micro_batches, self.setup.context)


def build_trainer(setup: Setup, hooks: dict[str, Hook]) -> Trainer:
    """Build data, model and optimizer, and load weights: the run's own checkpoint, else `checkpoint.init_from`.

    All ranks must call.
    """
    config, context = setup.config, setup.context
    stage = STAGES[config.stage]
    resume_from = whole_checkpoint(config.run_dir, context)
    data = _data_fingerprints(setup)
    if resume_from is not None:
        check_same_data(read_state(resume_from)["data"], data)
    parts = stage.build(setup)  # refuses data that does not fit, before anything is written
    if context.rank == 0:
        open_run_folder(config, context.world_size)
        stop_file(config.run_dir).unlink(missing_ok=True)
    context.barrier()
    soft_mask = SoftMask(config.soft_mask, config.train.steps, context.device)
    chunks, core = build_model(config, context.device, soft_mask, stage.head)
    if resume_from is None and config.checkpoint.init_from is not None:
        load_weights(find_checkpoint(config.checkpoint.init_from), chunks, context)
    wrapped = wrap_for_training(chunks, core, config)
    optimizer, scheduler = build_optimizer(wrapped, core, config)
    trainer = Trainer(setup, parts, wrapped, optimizer, scheduler, soft_mask, data, hooks)
    if resume_from is not None:
        state = load_checkpoint(resume_from, wrapped, optimizer)
        trainer.step = state["step"]
        trainer.skipped = SkippedSteps(**state["skipped"])
        if context.rank == 0:
            print(f"going on from step {trainer.step} of {config.train.steps}", file=sys.stderr, flush=True)
        scheduler.step(trainer.step)
        soft_mask.at_step(trainer.step)  # a finished run evaluates without another step
        for name, hook in hooks.items():
            hook.restore(trainer, state["hooks"].get(name, {}))
    return trainer


def _data_fingerprints(setup: Setup) -> Fingerprints:
    """As rank 0 sees the files: hundreds of ranks needn't read them. All ranks must call."""
    box = [data_fingerprints(setup.config) if setup.context.rank == 0 else {}]
    dist.broadcast_object_list(box, src=0, group=setup.context.world_group, device=setup.context.device)
    return box[0]


def train(trainer: Trainer) -> dict[str, float]:
    """Run to the last step, or a request to stop, writing metrics and checkpoints. All ranks must call.

    Returns:
        The last step's metrics; empty if there was nothing left to do.

    Raises:
        FloatingPointError: on all ranks, after too many skipped steps in a row.
        OSError: if a checkpoint can't be written.
    """
    config, context = trainer.setup.config, trainer.setup.context
    writer = None
    if context.rank == 0:
        writer = MetricsWriter(
            config.run_dir,
            config.stage,
            config.train.steps,
            trainer.step,
            log_every=config.train.log_every,
            mining=config.mining,
        )
    checkpointer = Checkpointer(config, context)
    values: dict[str, float] = {}
    try:
        with (
            StopRequest(config.run_dir, context.rank) as request,
            Watchdog(trainer.phases, config.watchdog, context, lambda: request.signalled_at),
            ProfilerWindow(config.profile, config.run_dir, context.rank) as window,
        ):
            if _wants_dry_run(trainer):
                with trainer.phases.within("dry_run"):
                    dry_run(trainer)
            if context.rank == 0 and trainer.step < config.train.steps:
                tell_mix(trainer.parts.data.blends)
            while trainer.step < config.train.steps:
                window.before_step(trainer.step + 1)
                values = one_step(trainer)
                if writer is not None:
                    writer.write(trainer.step, values)
                if _keep(trainer, checkpointer, request):
                    break
            with trainer.phases.within("checkpoint"):
                checkpointer.finish()
            for name, hook in trainer.hooks.items() if trainer.step == config.train.steps else ():
                with trainer.phases.within(name):
                    hook.after_training(trainer)
    finally:
        if writer is not None:
            writer.close()
        checkpointer.close()
    if context.rank == 0:
        tell_realised(trainer.parts.data.blends, trainer.step, trainer.parts.data.samples_taken(trainer.step))
    return values


def _wants_dry_run(trainer: Trainer) -> bool:
    """As the config says, else where memory is short and an error late is dear: on GPUs."""
    asked, device = trainer.setup.config.train.dry_run, trainer.setup.context.device
    return trainer.step < trainer.setup.config.train.steps and (device.type == "cuda" if asked is None else asked)


def one_step(trainer: Trainer) -> dict[str, float]:
    """One step: hooks, data, forward, backward, update. All ranks must call. Returns the step's metrics."""
    setup, phases = trainer.setup, trainer.phases
    step = phases.step = trainer.step + 1
    alpha = trainer.soft_mask.at_step(step)
    hook_values: dict[str, float] = {}
    for name, hook in trainer.hooks.items():
        with phases.within(name):
            hook_values.update(hook.before_step(trainer, step))
    started = time.monotonic()
    with phases.within("data"):
        batch = trainer.parts.data.batch(step)
    trainer.scheduler.step(1)
    forward_backward = partial(trainer.parts.forward_backward, trainer.chunks, batch)
    values = train_step(trainer.chunks, trainer.optimizer, forward_backward, setup.context, phases)
    trainer.step = step
    if is_finite(values):
        with phases.within("optimizer"):
            values |= trainer.parts.after_update()
    seconds = time.monotonic() - started
    _skip_if_not_finite(trainer, batch, values)
    timing = {
        "tokens_per_second": values["tokens"] / seconds,
        "step_seconds": seconds,
        **phase_seconds(phases.take()),
        "memory_gib": memory_gib(setup.context.device),
    }
    attended_pairs = values.pop("attended_pairs")
    if (peak := peak_flops(setup.config, setup.context.device)) is not None:
        flops = step_flops(setup.config, values["tokens"], attended_pairs, causal=alpha == 0.0)
        timing["mfu"] = flops / (seconds * setup.context.world_size * peak)
    mask = {"alpha": alpha} if setup.config.is_contrastive else {}
    mix = mix_metrics(trainer.parts.data.samples_taken(step))
    skipped = {"skipped_steps": float(trainer.skipped.total)} if trainer.skipped.total else {}
    first = {"loss": values.pop("loss"), "lr": get_canonical_lr_for_logging(trainer.optimizer.param_groups) or 0.0}
    return {**first, **values, **timing, **mask, **mix, **hook_values, **skipped}


def _skip_if_not_finite(trainer: Trainer, batch: Any, values: dict[str, float]) -> None:
    """Count a step that changed nothing; too many in a row end the run, with every rank's batch kept."""
    config, context, skipped = trainer.setup.config, trainer.setup.context, trainer.skipped
    if not skipped.note(values):
        return
    what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
    if skipped.in_a_row <= config.train.max_skipped_steps:
        if context.rank == 0:
            print(f"warning: step {trainer.step} is skipped: {what}", file=sys.stderr, flush=True)
        return
    folder = save_batch(config.run_dir, trainer.step, context.rank, batch, values)
    context.barrier()
    raise FloatingPointError(
        f"step {trainer.step} is not finite ({what}), the {skipped.in_a_row}. in a row; its batch is kept in {folder}: "
        "look at it, or start with a lower optimizer.lr from an earlier checkpoint (train.max_skipped_steps)"
    )


def _keep(trainer: Trainer, checkpointer: Checkpointer, request: StopRequest) -> bool:
    """Name the checkpoint that has been written, and save one if it is due. Returns whether to stop, as all ranks agree."""
    config, step, context = trainer.setup.config, trainer.step, trainer.setup.context
    with trainer.phases.within("agree"):
        stop, unwritten = _on_any_rank(context, request.is_made(), not checkpointer.is_written())
    every = config.checkpoint.every
    due = stop or step == config.train.steps or (every is not None and step % every == 0)
    if not due and (unwritten or not checkpointer.is_saving):
        return False
    with trainer.phases.within("checkpoint"):
        if due:
            checkpointer.save(step, trainer.chunks, trainer.optimizer, _state(trainer))
        if stop or not due:
            checkpointer.finish()
    if stop and step < config.train.steps and context.rank == 0:
        print(
            f"stopped on request after step {step} of {config.train.steps}; the same command goes on",
            file=sys.stderr,
            flush=True,
        )
    return stop


def _on_any_rank(context: ParallelContext, *flags: bool) -> list[bool]:
    """Which of the flags are set on some rank. All ranks must call."""
    if context.world_size == 1:
        return list(flags)
    numbers = torch.tensor(flags, dtype=torch.int32, device=context.device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=context.world_group)
    return [bool(number) for number in numbers.tolist()]


def _state(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint says of the run, beside weights and optimizer."""
    config = trainer.setup.config
    return {
        "stage": config.stage,
        "alpha": trainer.soft_mask.value,
        "soft_mask_form": config.soft_mask.form,
        "model": shape_fields(config),
        "projection_dim": config.pooling.projection_dim,
        "tokenizer_sha256": trainer.setup.tokenizer.sha256,
        "data": trainer.data,
        "steps": config.train.steps,
        "skipped": asdict(trainer.skipped),
        "hooks": {name: hook.state(trainer, trainer.step) for name, hook in trainer.hooks.items()},
    }
