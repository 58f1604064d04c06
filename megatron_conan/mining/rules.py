"""When negatives in use have become easy and give way to others of their pool."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SwapRule:
    """When a negative gives way to the next candidate (Conan-embedding-v2, dynamic hard negatives).

    With S the loss's similarity now and S0 the score with which the negative came in: replaced if S0 < low_score, or
    if drop_ratio x S < S0 and S < high_score.
    """

    low_score: float = 0.4
    drop_ratio: float = 1.2
    high_score: float = 0.7

    def is_due(self, initial: np.ndarray, now: np.ndarray) -> np.ndarray:
        """[n] bool, which of n negatives are to be replaced, from their S0 and S; computed in float64."""
        initial, now = initial.astype(np.float64), now.astype(np.float64)
        return (initial < self.low_score) | ((self.drop_ratio * now < initial) & (now < self.high_score))


@dataclass(frozen=True)
class QueryRule:
    """When all negatives of a query give way to the next block of candidates (Conan-embedding, dynamic hard negatives).

    With S the mean similarity of the query's negatives now and S0 their mean score when they came in: replaced if
    drop_ratio x S < S0 and |S| < high_score, tested every `every` steps. Of n negatives a query, replacement i (from 1)
    takes places offset + (i - 1) n to offset + i n (end excluded) of the pool.
    """

    drop_ratio: float = 1.15
    high_score: float = 0.8
    every: int = 100
    offset: int = 10

    def is_due(self, initial: np.ndarray, now: np.ndarray) -> np.ndarray:
        """[n] bool, which of n queries are to have others, from their mean S0 and S; computed in float64."""
        initial, now = initial.astype(np.float64), now.astype(np.float64)
        return (self.drop_ratio * now < initial) & (np.abs(now) < self.high_score)


Rule = SwapRule | QueryRule
