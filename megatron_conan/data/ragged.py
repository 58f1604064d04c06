"""Lists of different lengths as two arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """k lists; list i is `values[offsets[i] : offsets[i + 1]]`."""

    values: np.ndarray
    """[n] int64, all lists one behind the other."""
    offsets: np.ndarray
    """[k + 1] int64."""

    @classmethod
    def of(cls, lists: Sequence[np.ndarray]) -> Ragged:
        """From the lists themselves."""
        offsets = np.cumsum([0, *(len(values) for values in lists)])
        return cls(np.concatenate([np.empty(0, np.int64), *lists]).astype(np.int64), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """[k] int64 length of each list."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> np.ndarray:
        """[n] int64 list of each value."""
        return np.repeat(np.arange(len(self)), self.counts)

    def take(self, which: np.ndarray | slice) -> Ragged:
        """Some of the lists, in the order asked for."""
        begin, end = self.offsets[:-1][which], self.offsets[1:][which]
        return Ragged(self.values[ranges(begin, end)[1]], np.append(0, np.cumsum(end - begin)))


def ranges(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of the ranges begin .. end - 1 ([k] each), one range behind the other: (range, number), [n] each."""
    counts = end - begin
    which = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return which, begin[which] + within
