"""The two stages that predict next tokens: pretrain (packed documents) and sft (outputs only)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_conan.data.batch import LMBatch
from megatron_conan.data.packed_lm import build_lm_dataset, lm_batch
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.sampler import SourceSchedule, dp_slice, sample_indices
from megatron_conan.data.sft import SFTDataset, sft_batch
from megatron_conan.loss.lm import masked_sum
from megatron_conan.train.setup import Setup
from megatron_conan.train.step import LossFunction, StepReport


class PackedDocuments:
    """Pretraining data: documents packed into sequences of `seq_length`, sources blended by weight."""

    def __init__(self, setup: Setup) -> None:
        """Open the sources; rank 0 builds megatron-core's sample index in the run folder first."""
        config = setup.config
        self.setup, self.batch_size = setup, config.train.global_batch_size
        self.dataset = build_lm_dataset(
            [source.prefix for source in config.data.sources],
            [source.weight for source in config.data.sources],
            seq_length=config.seq_length,
            num_samples=config.train.steps * self.batch_size,
            seed=config.train.seed,
            tokenizer=setup.tokenizer,
            cache_dir=config.run_dir / "index_cache",
        )

    def micro_batches(self, step: int) -> list[LMBatch]:
        """This rank's micro-batches of step `step` (from 1)."""
        start = (step - 1) * self.batch_size
        indices = torch.arange(start, start + self.batch_size).numpy()
        context = self.setup.context
        parts = dp_slice(indices, context.dp_rank, context.dp_size, self.setup.config.train.micro_batch_size)
        return [lm_batch(self.dataset, part).to(context.device) for part in parts]


class Instructions:
    """SFT data: prompt, output and EOS a sequence; one source a global batch."""

    def __init__(self, setup: Setup) -> None:
        """Open the sources."""
        config = setup.config
        self.setup = setup
        stores = [PairStore(source.prefix, setup.tokenizer) for source in config.data.sources]
        self.datasets = [SFTDataset(store, setup.tokenizer, config.seq_length) for store in stores]
        weights = [source.weight for source in config.data.sources]
        self.schedule = SourceSchedule([len(dataset) for dataset in self.datasets], weights, seed=config.train.seed)

    def micro_batches(self, step: int) -> list[LMBatch]:
        """This rank's micro-batches of step `step` (from 1)."""
        config, context = self.setup.config, self.setup.context
        dataset = self.datasets[self.schedule.source_at(step - 1)]
        size = config.train.global_batch_size
        start = self.schedule.batches_before(step - 1) * size
        rows = sample_indices(len(dataset), config.train.seed, start, size)
        parts = dp_slice(rows, context.dp_rank, context.dp_size, config.train.micro_batch_size)
        return [sft_batch(dataset, part).to(context.device) for part in parts]


def forward_step(batches: Iterator[LMBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    """Causal attention with padding on the right needs no padding mask: no valid position sees it."""
    batch = next(batches)
    return model(batch.tokens, labels=batch.labels), partial(_loss, batch)


def _loss(batch: LMBatch, losses: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Sum of token losses, their count (megatron-core divides once by the global count), and the report."""
    total, count = masked_sum(losses, batch.loss_mask)
    report = StepReport(
        means={"loss": (total.detach().item(), count.item())}, totals={"tokens": float(batch.lengths.sum().item())}
    )
    return total, count, report
