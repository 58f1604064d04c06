"""What sets the four stages apart: data, forward step, head. The loop knows none of them by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_conan.model.conan import Head
from megatron_conan.train import language
from megatron_conan.train.contrastive import Objective, Pairs
from megatron_conan.train.setup import Setup
from megatron_conan.train.step import ForwardStep


class StageData(Protocol):
    """Where a step's batches come from."""

    def micro_batches(self, step: int) -> list[Any]:
        """This rank's micro-batches of step `step` (from 1); a pure function of the config, the step, and mining."""


@dataclass(frozen=True)
class StageParts:
    """A stage, built for one run."""

    data: StageData
    forward_step: ForwardStep


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe."""

    head: Head
    build: Callable[[Setup], StageParts]


def _contrastive_parts(setup: Setup) -> StageParts:
    data = Pairs(setup)
    return StageParts(data, Objective(setup, data).forward_step)


STAGES: dict[str, Stage] = {
    "pretrain": Stage("lm", lambda setup: StageParts(language.PackedDocuments(setup), language.forward_step)),
    "sft": Stage("lm", lambda setup: StageParts(language.Instructions(setup), language.forward_step)),
    "weak": Stage("embedding", _contrastive_parts),
    "finetune": Stage("embedding", _contrastive_parts),
}
