"""What sets the four stages apart: data, forward step, head. The loop knows none of them by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core.distributed import DistributedDataParallel

from megatron_conan.data.blending import Blend
from megatron_conan.model.conan import Head
from megatron_conan.train import language
from megatron_conan.train.contrastive import Contrastive
from megatron_conan.train.largest_batch import LargestBatch
from megatron_conan.train.pair_data import Pairs
from megatron_conan.train.setup import Setup
from megatron_conan.train.step import StepReport


class StageData(Protocol):
    """Where a step's data come from."""

    def batch(self, step: int) -> Any:
        """This rank's share of step `step` (from 1); a pure function of the config, the step, and mining."""

    def largest_batch(self) -> LargestBatch:
        """A batch as large as any that `batch` can give."""

    def samples_taken(self, step: int) -> dict[str, int]:
        """Samples (sequences, rows) of each source in steps 1 .. step, by name; a pure function of config and step."""

    @property
    def blends(self) -> list[Blend]:
        """How the sources are mixed; two, where scored pairs stand beside every batch."""


@dataclass(frozen=True)
class StageParts:
    """A stage, built for one run."""

    data: StageData
    forward_backward: Callable[[list[DistributedDataParallel], Any], list[StepReport]]
    """Accumulates the gradients of what `data.batch` gave."""
    after_update: Callable[[], dict[str, float]] = dict
    """Called on all ranks once the step has changed the weights; returns metrics, the same on all ranks."""


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe."""

    head: Head
    build: Callable[[Setup], StageParts]


def _contrastive_parts(setup: Setup) -> StageParts:
    data = Pairs(setup)
    contrastive = Contrastive(setup, data)
    return StageParts(data, contrastive.forward_backward, contrastive.after_update)


def _language_parts(data: language.PackedDocuments | language.Instructions) -> StageParts:
    return StageParts(data, language.LanguageModelling(data.setup.config).forward_backward)


STAGES: dict[str, Stage] = {
    "pretrain": Stage("lm", lambda setup: _language_parts(language.PackedDocuments(setup))),
    "sft": Stage("lm", lambda setup: _language_parts(language.Instructions(setup))),
    "weak": Stage("embedding", _contrastive_parts),
    "finetune": Stage("embedding", _contrastive_parts),
}
