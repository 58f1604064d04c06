"""What the training loop costs beside data, forward and backward, and the optimizer."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from recording import Row
from training_step_runs import Files, build, our_step, take_turns

from megatron_conan.train.loop import Trainer, one_step, train
from megatron_conan.train.metrics import MetricsWriter
from megatron_conan.train.phases import Phases
from megatron_conan.train.stages import StageParts
from megatron_conan.train.stopping import StopRequest

WORK = ("data", "forward_backward", "optimizer")
BESIDE = ("mining", "evaluation", "checkpoint")
IDLE_STEPS = 200


@dataclass
class SummedPhases(Phases):
    """Phases that keep the seconds from the first step's end to the last one's."""

    totals: dict[str, float] = field(default_factory=dict)
    has_begun: bool = False

    def take(self) -> dict[str, float]:
        """As before; added up but for the first time, which also tells of what came before the steps."""
        taken = super().take()
        counted, self.has_begun = taken if self.has_begun else {}, True
        for phase, seconds in counted.items():
            self.totals[phase] = self.totals.get(phase, 0.0) + seconds
        return taken


class NoUpdate:
    """An optimizer that does nothing, as far as a step asks."""

    chained_optimizers: tuple[()] = ()

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.param_groups = param_groups

    def zero_grad(self) -> None:
        """Nothing."""

    def prepare_grads(self) -> bool:
        """No infinite gradients."""
        return False

    def get_grad_norm(self) -> float:
        """Nothing to clip."""
        return 0.0

    def step_with_ready_grads(self) -> bool:
        """Done."""
        return True


class SameBatch:
    """Data that lie ready."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def batch(self, step: int) -> Any:
        """The one batch, whatever the step."""
        return self._batch


def loop_row(files: Files, stage: str, model: str, repetitions: int) -> Row:
    """The line of table "loop" of a stage and a model."""
    by_phases = _share_by_phases(files, stage, model, repetitions)
    trainer = build(files.config(stage, model, f"loop_{model}_{stage}"))
    one_step(trainer)
    batch = trainer.parts.data.batch(2)
    calls = {
        "whole": partial(one_step, trainer),
        "parts": partial(our_step, trainer, batch),
        "data": partial(trainer.parts.data.batch, 2),
    }
    seconds = {name: statistics.median(values) for name, values in take_turns(calls, repetitions).items()}
    alone = _idle_step_seconds(trainer, batch)
    rest = seconds["whole"] - seconds["parts"] - seconds["data"]
    return {
        "stage": stage,
        "model": model,
        "step, s": seconds["whole"],
        "data, s": seconds["data"],
        "loop by phases": by_phases,
        "loop as rest, s": rest,
        "loop as rest": rest / seconds["whole"],
        "loop alone, s": alone,
        "loop alone": alone / seconds["whole"],
    }


def _share_by_phases(files: Files, stage: str, model: str, num_steps: int) -> float:
    """Loop's share of the seconds of a run's steps, checkpoints left out, with metrics written every step."""
    words = [f"train.steps={num_steps + 2}", "train.log_every=1"]
    trainer = build(files.config(stage, model, f"phases_{model}_{stage}", words))
    one_step(trainer)
    phases = trainer.phases = SummedPhases(step=1)
    train(trainer)
    loop = sum(seconds for phase, seconds in phases.totals.items() if phase not in (*WORK, *BESIDE))
    return loop / (loop + sum(phases.totals[phase] for phase in WORK))


def _idle_step_seconds(trainer: Trainer, batch: Any) -> float:
    """CPU-seconds of a step, with its metrics written, whose data lie ready and whose parts do nothing."""
    config, context = trainer.setup.config, trainer.setup.context
    reports = trainer.parts.forward_backward(trainer.chunks, batch)
    idle: Any = NoUpdate(trainer.optimizer.param_groups)
    parts = StageParts(SameBatch(batch), lambda *_: reports)
    idler = replace(trainer, parts=parts, chunks=[], optimizer=idle, phases=Phases())
    writer = MetricsWriter(config.run_dir, config.stage, config.train.steps, trainer.step)
    with torch.no_grad(), StopRequest(config.run_dir, context.rank) as request:
        began = time.process_time()
        for _ in range(IDLE_STEPS):
            writer.write(idler.step + 1, one_step(idler))
            request.is_made()
        seconds = time.process_time() - began
    writer.close()
    return seconds / IDLE_STEPS
