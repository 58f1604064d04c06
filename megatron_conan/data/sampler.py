"""Which rows and which source a step trains on: pure functions of (seed, step), so a resumed run needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

SCHEDULE_BLOCK = 32
"""Steps in which every source is drawn in proportion to its weight, to within one."""


@lru_cache(maxsize=32)
def _epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """[num_samples] permutation of one epoch, in a small integer type; cached, as every step reads from it."""
    dtype = np.uint32 if num_samples <= np.iinfo(np.uint32).max else np.int64
    order = np.arange(num_samples, dtype=dtype)
    np.random.Generator(np.random.PCG64([seed, epoch])).shuffle(order)
    order.flags.writeable = False
    return order


def sample_indices(num_samples: int, seed: int, start: int, count: int) -> np.ndarray:
    """Elements `start .. start + count` of an endless stream made of one permutation of the samples after another.

    Args:
        num_samples: size of the data set; every epoch holds each of 0 .. num_samples - 1 once.
        seed: non-negative; another seed gives other permutations.
        start: position in the stream, e.g. step x global batch size.
        count: number of elements; may span several epochs.

    Returns:
        [count] int64.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: there is nothing to sample from")
    if seed < 0 or start < 0 or count < 0:
        raise ValueError(f"seed={seed}, start={start} and count={count} must not be negative")
    indices = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        epoch, offset = divmod(start + filled, num_samples)
        part = _epoch_permutation(num_samples, seed, epoch)[offset : offset + count - filled]
        indices[filled : filled + len(part)] = part
        filled += len(part)
    return indices


class SourceSchedule:
    """Which source the batch of a step comes from.

    Steps are drawn in blocks of `SCHEDULE_BLOCK`; the block places an evenly spaced grid with a random offset over the
    cumulated weights and takes it in random order. So a source of weight w gets w x block batches, to within one, in
    every block, its expectation is exact however small w is, and counting earlier batches needs only the offsets.

    Args:
        sizes: number of rows of each source.
        weights: relative frequency of each source; None takes size ** (1 / temperature).
        temperature: 1 is proportional to size, larger values are closer to uniform; only without weights.
        seed: non-negative.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        self.weights = _normalised_weights(sizes, weights, temperature)
        self.seed = seed
        # inner edges only: what lies behind the last one belongs to the last source, whatever the rounding
        self._edges = np.cumsum(self.weights)[:-1]
        self._offsets = np.empty(0)
        self._counts_before = np.empty((0, len(self.weights)), dtype=np.int64)

    def source_at(self, step: int) -> int:
        """Index of the source of the batch at `step` (0-based)."""
        block, position = divmod(step, SCHEDULE_BLOCK)
        return int(self._sources_of_block(block)[position])

    def batches_before(self, step: int) -> int:
        """How many steps before `step` drew from the source of `step`: that source's own batch number."""
        block, position = divmod(step, SCHEDULE_BLOCK)
        sources = self._sources_of_block(block)
        source = sources[position]
        return int((sources[:position] == source).sum() + self._counts_before[block, source])

    def batches_of(self, steps: int) -> np.ndarray:
        """[sources] int64: batches of each source in the first `steps` steps."""
        block, position = divmod(steps, SCHEDULE_BLOCK)
        sources = self._sources_of_block(block)
        return self._counts_before[block] + np.bincount(sources[:position], minlength=len(self.weights))

    def _sources_of_block(self, block: int) -> np.ndarray:
        """[SCHEDULE_BLOCK] source of each step of a block."""
        self._extend_to(block)
        order = np.random.Generator(np.random.PCG64([self.seed, 1, block])).permutation(SCHEDULE_BLOCK)
        return self._grid_sources(self._offsets[block : block + 1])[0, order]

    def _extend_to(self, block: int) -> None:
        """Tabulate offsets and counts up to `block`; a cache: the offsets are a prefix of one random stream."""
        if block < len(self._offsets):
            return
        num_blocks = 2 * block + 64
        self._offsets = np.random.Generator(np.random.PCG64([self.seed, 0])).random(num_blocks)
        sources = self._grid_sources(self._offsets)
        counts = np.stack([(sources == source).sum(axis=1) for source in range(len(self.weights))], axis=1)
        # [blocks, sources] -> batches of each source in all blocks before this one
        self._counts_before = np.cumsum(counts, axis=0) - counts

    def _grid_sources(self, offsets: np.ndarray) -> np.ndarray:
        """[n, SCHEDULE_BLOCK] source of each grid point of blocks with these offsets [n] in [0, 1)."""
        points = (np.arange(SCHEDULE_BLOCK) + offsets[:, None]) / SCHEDULE_BLOCK
        return np.searchsorted(self._edges, points, side="right")


def dp_slice(global_indices: np.ndarray, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """The micro-batches of one data-parallel rank, in megatron-core's order.

    Micro-batch m of dp rank r holds the rows from `(m * dp_size + r) * micro_batch_size` on.

    Args:
        global_indices: [global_batch_size].

    Returns:
        global_batch_size / (dp_size x micro_batch_size) arrays [micro_batch_size].
    """
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank} must be in 0 .. dp_size-1={dp_size - 1}")
    global_batch_size, stride = len(global_indices), dp_size * micro_batch_size
    if stride < 1 or global_batch_size % stride:
        raise ValueError(
            f"global_batch_size={global_batch_size} must be divisible by "
            f"micro_batch_size={micro_batch_size} x dp={dp_size} = {stride}"
        )
    # [g] -> [micro-batches, dp, mb] -> [micro-batches, mb]
    return list(np.asarray(global_indices).reshape(-1, dp_size, micro_batch_size)[:, dp_rank])


def _normalised_weights(sizes: Sequence[int], weights: Sequence[float] | None, temperature: float | None) -> np.ndarray:
    """[sources] float64 summing to 1."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)}: every source needs at least one row")
    if weights is not None:
        if temperature is not None:
            raise ValueError(f"weights={list(weights)} and temperature={temperature} exclude each other; give one")
        raw = np.asarray(weights, dtype=np.float64)
        if len(raw) != len(sizes) or not np.isfinite(raw).all() or (raw <= 0).any():
            raise ValueError(f"weights={list(weights)} must be {len(sizes)} positive numbers, one a source")
    else:
        temperature = 1.0 if temperature is None else temperature
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive (1: by size; large: uniform)")
        raw = np.exp(np.log(np.asarray(sizes, dtype=np.float64)) / temperature)
    return raw / raw.sum()
