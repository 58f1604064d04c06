"""How often each length comes: statistics of any number of lengths in memory that grows with the distinct ones only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class LengthCounts:
    """Counts of lengths.

    Args:
        blocks: [any] integers of 0 or more each.
    """

    def __init__(self, blocks: Iterable[np.ndarray] = ()) -> None:
        self.values = np.empty(0, np.int64)
        """[k] distinct lengths, ascending."""
        self.counts = np.empty(0, np.int64)
        """[k] how often each comes."""
        for block in blocks:
            self.add(block)

    def add(self, lengths: np.ndarray) -> None:
        """Count further lengths, [any]."""
        values, counts = np.unique(np.asarray(lengths, np.int64), return_counts=True)
        self.values, place = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        added = np.concatenate([self.counts, counts])
        self.counts = np.zeros(len(self.values), np.int64)
        np.add.at(self.counts, place, added)

    def __len__(self) -> int:
        """Lengths counted."""
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Sum of all lengths."""
        return int(self.values @ self.counts)

    @property
    def num_empty(self) -> int:
        """How often the length 0 comes."""
        return int(self.counts[self.values == 0].sum())

    def percentile(self, percent: int) -> int:
        """The smallest length such that `percent` % of all are no longer; there must be one at least."""
        rank = max(-(-percent * len(self) // 100), 1)
        return int(self.values[np.searchsorted(np.cumsum(self.counts), rank)])

    def buckets(self) -> list[tuple[int, int]]:
        """(b, lengths in bucket b), from the first bucket that has any to the last.

        Bucket 0 is the length 0, bucket b the lengths from 2^(b - 1) to 2^b - 1.
        """
        if not len(self.values):
            return []
        bucket = np.frexp(self.values)[1]  # bits of each number
        in_bucket = np.zeros(int(bucket[-1]) + 1, np.int64)
        np.add.at(in_bucket, bucket, self.counts)
        return [(b, int(in_bucket[b])) for b in range(int(bucket[0]), len(in_bucket))]


def bucket_name(bucket: int) -> str:
    """The lengths of a bucket, e.g. 2,048-4,095."""
    if bucket < 2:
        return str(bucket)
    return f"{1 << (bucket - 1):,}-{(1 << bucket) - 1:,}"
