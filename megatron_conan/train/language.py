"""The two stages that predict next tokens: pretrain (packed documents) and sft (outputs only)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_conan.config import RunConfig
from megatron_conan.data.batch import LMBatch
from megatron_conan.data.blending import blend_sources
from megatron_conan.data.packed_lm import build_lm_dataset, lm_batch, samples_by_source, samples_per_epoch
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.sampler import SourceSchedule, dp_slice, sample_indices
from megatron_conan.data.sft import SFTDataset, sft_batch
from megatron_conan.loss.lm import masked_sum
from megatron_conan.train.largest_batch import LargestBatch, max_in_flight
from megatron_conan.train.mix import blended, scheduled_samples, source_weights
from megatron_conan.train.setup import Setup
from megatron_conan.train.step import LossFunction, StepReport, run_schedule


class PackedDocuments:
    """Pretraining data: documents packed into sequences of `seq_length`, sources blended by weight."""

    def __init__(self, setup: Setup) -> None:
        """Open the sources; rank 0 builds megatron-core's sample index in the run folder first."""
        config = setup.config
        self.setup, self.batch_size = setup, config.train.global_batch_size
        prefixes = [source.prefix for source in config.data.sources]
        sizes = samples_per_epoch(prefixes, seq_length=config.seq_length, tokenizer=setup.tokenizer)
        num_samples = config.train.steps * self.batch_size
        self.blends = [blend_sources(blended(config.data.sources, _weights(config), sizes), num_samples)]
        self._counted, self._counts = 0, np.zeros(len(sizes), np.int64)
        self.dataset = build_lm_dataset(
            prefixes,
            self.blends[0].weights,
            seq_length=config.seq_length,
            num_samples=num_samples,
            seed=config.train.seed,
            tokenizer=setup.tokenizer,
            cache_dir=config.run_dir / "index_cache",
        )

    def batch(self, step: int) -> list[LMBatch]:
        """This rank's micro-batches of step `step` (from 1)."""
        start = (step - 1) * self.batch_size
        parts = _micro_batches(np.arange(start, start + self.batch_size), self.setup)
        return [lm_batch(self.dataset, part).to(self.setup.context.device) for part in parts]

    def samples_taken(self, step: int) -> dict[str, int]:
        """See StageData."""
        end = step * self.batch_size
        if end < self._counted:
            self._counted, self._counts = 0, np.zeros_like(self._counts)
        self._counts = self._counts + samples_by_source(self.dataset, len(self._counts), self._counted, end)
        self._counted = end
        return dict(zip([source.name for source in self.blends[0].sources], self._counts.tolist(), strict=True))

    def largest_batch(self) -> LargestBatch:
        """Of the size that all have."""
        return _largest_batch(self.batch(1), self.setup)


class Instructions:
    """SFT data: prompt, output and EOS a sequence; one source a global batch."""

    def __init__(self, setup: Setup) -> None:
        """Open the sources."""
        config = setup.config
        self.setup = setup
        stores = [PairStore(source.prefix, setup.tokenizer) for source in config.data.sources]
        self.datasets = [SFTDataset(store, setup.tokenizer, config.seq_length) for store in stores]
        sizes = [len(dataset) for dataset in self.datasets]
        sources = blended(config.data.sources, _weights(config), sizes, config.train.global_batch_size)
        self.blends = [blend_sources(sources, config.train.steps)]
        self.schedule = SourceSchedule(sizes, self.blends[0].weights, seed=config.train.seed)

    def batch(self, step: int) -> list[LMBatch]:
        """This rank's micro-batches of step `step` (from 1)."""
        train = self.setup.config.train
        dataset = self.datasets[self.schedule.source_at(step - 1)]
        start = self.schedule.batches_before(step - 1) * train.global_batch_size
        rows = sample_indices(len(dataset), train.seed, start, train.global_batch_size)
        parts = _micro_batches(rows, self.setup)
        return [sft_batch(dataset, part).to(self.setup.context.device) for part in parts]

    def samples_taken(self, step: int) -> dict[str, int]:
        """See StageData."""
        return scheduled_samples(self.schedule, self.blends[0], step)

    def largest_batch(self) -> LargestBatch:
        """Of the size that all have: they are padded."""
        return _largest_batch(self.batch(1), self.setup)


class LanguageModelling:
    """Next-token prediction through megatron-core's schedule."""

    def __init__(self, config: RunConfig) -> None:
        """`config` gives the sizes of a micro-batch."""
        self.config = config

    def forward_backward(self, chunks: list[DistributedDataParallel], micro_batches: list[LMBatch]) -> list[StepReport]:
        """Accumulate the gradients of a step. All ranks must call. Returns the micro-batches' reports (last stage)."""
        size = self.config.train.micro_batch_size
        assert size is not None
        return run_schedule(
            chunks, _forward_step, micro_batches, seq_length=self.config.seq_length, micro_batch_size=size
        )


def _forward_step(batches: Iterator[LMBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    """Causal attention with padding on the right needs no padding mask: no valid position sees it."""
    batch = next(batches)
    return model(batch.tokens, labels=batch.labels), partial(_loss, batch)


def _micro_batches(indices: np.ndarray, setup: Setup) -> list[np.ndarray]:
    """This rank's share of a global batch's samples."""
    size = setup.config.train.micro_batch_size
    assert size is not None
    return dp_slice(indices, setup.context.dp_rank, setup.context.dp_size, size)


def _largest_batch(micro_batches: list[LMBatch], setup: Setup) -> LargestBatch:
    """As many of a step's micro-batches as the pipeline holds at once."""
    kept = micro_batches[: max_in_flight(setup.context, setup.config.parallel.virtual_pipeline is not None)]
    num_tokens = sum(batch.tokens.numel() for batch in kept)
    return LargestBatch(kept, len(kept), num_tokens, longest=setup.config.seq_length)


def _weights(config: RunConfig) -> list[float]:
    """The sources' weights; all alike if none is given."""
    return source_weights(config.data.sources) or [1.0] * len(config.data.sources)


def _loss(batch: LMBatch, losses: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Sum of token losses, their count (megatron-core divides once by the global count), and the report."""
    total, count = masked_sum(losses, batch.loss_mask)
    lengths = batch.lengths.double()
    report = StepReport(
        means={"loss": (total.detach().double(), count.double())},
        totals={"tokens": lengths.sum(), "attended_pairs": lengths.square().sum()},
    )
    return total, count, report
