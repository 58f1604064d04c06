"""From search results to a pool of hard negatives a query. Pure numpy.

Shapes: `q` queries, `n` search results a query, `p` pool size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_conan.data.ragged import Ragged

# Why a search result did not become a candidate, in the order of the tests.
REASONS = ("known", "beyond_window", "skipped", "margin", "ceiling")
# Why a pool is incomplete; "corpus": nothing but known documents was turned down, there are too few documents.
SHORT_REASONS = (*REASONS, "corpus")
KNOWN, BEYOND_WINDOW, SKIPPED, MARGIN, CEILING = range(len(REASONS))


@dataclass(frozen=True)
class SelectionSettings:
    """Which search results may become negatives."""

    pool_size: int
    """Candidates kept a query."""
    window: int | None = None
    """Nearest candidates looked at, known documents not counted; None for all results."""
    skip_top: int = 0
    """Nearest candidates passed over, known documents not counted."""
    margin: float | None = None
    """Distance from the positive's score; None for no test."""
    margin_kind: Literal["relative", "absolute"] = "relative"
    """relative: at most positive - (1 - margin) |positive|, which is margin x positive for a positive score;
    absolute: at most positive - margin."""
    ceiling: float | None = None
    """Highest score of a candidate; None for no test."""
    sample_seed: int | None = None
    """Draw the pool evenly from all candidates, by this seed; None takes the nearest."""

    def __post_init__(self) -> None:
        if self.pool_size < 1:
            raise ValueError(f"pool_size={self.pool_size} must be at least 1")
        if self.skip_top < 0:
            raise ValueError(f"skip_top={self.skip_top} must not be negative")
        if self.window is not None and self.window < self.skip_top + 1:
            raise ValueError(f"window={self.window} leaves nothing after skip_top={self.skip_top}; widen the window")
        if self.margin_kind not in ("relative", "absolute"):
            raise ValueError(f"margin_kind={self.margin_kind!r} must be relative or absolute")
        if self.margin is not None and self.margin < 0:
            raise ValueError(f"margin={self.margin} must not be negative")
        if self.margin is not None and self.margin_kind == "relative" and self.margin > 1:
            raise ValueError(f"margin={self.margin} must be at most 1, a share of the positive's score")


@dataclass(frozen=True)
class Selection:
    """The pools, and what became of the results that are in none."""

    ids: np.ndarray
    """[q, p] int64, best first, -1 where there are fewer."""
    scores: np.ndarray
    """[q, p] float32, -inf where there are fewer."""
    missing: np.ndarray
    """[q] int64, entries that the pool lacks."""
    rejected: np.ndarray
    """[q, len(REASONS)] int64, search results turned down, by reason."""

    def short_reason(self) -> np.ndarray:
        """[q] place in SHORT_REASONS of what turned down most of a query's results; -1 where its pool is complete."""
        by_reason = self.rejected.copy()
        by_reason[:, KNOWN] = 0
        main = np.where(by_reason.sum(axis=1) > 0, by_reason.argmax(axis=1), SHORT_REASONS.index("corpus"))
        return np.where(self.missing > 0, main, -1)


def lowest_scores(scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The lowest of each query's positive scores (those from offsets[i] to offsets[i + 1], at least one): [q] float32."""
    return np.minimum.reduceat(scores, offsets[:-1]).astype(np.float32) if len(scores) else np.empty(0, np.float32)


def margin_limit(positive_scores: np.ndarray, settings: SelectionSettings) -> np.ndarray:
    """The highest score a candidate may have: [q] float64."""
    positive = positive_scores.astype(np.float64)
    if settings.margin is None:
        return np.full(len(positive), np.inf)
    if settings.margin_kind == "absolute":
        return positive - settings.margin
    # A share of a negative score would lie above it, which is the wrong way: there the distance is mirrored.
    return np.where(positive >= 0, settings.margin * positive, positive - (1 - settings.margin) * np.abs(positive))


def select_negatives(
    scores: np.ndarray,
    ids: np.ndarray,
    known: Ragged,
    positive_scores: np.ndarray,
    settings: SelectionSettings,
    query_ids: np.ndarray | None = None,
) -> Selection:
    """Choose each query's pool of hard negatives.

    Args:
        scores: [q, n] float32, falling along a row (as `ShardedIndex.search` returns them); -inf as padding.
        ids: [q, n] int64 document ids, -1 as padding.
        known: q lists of ids that must not become negatives: positives, sibling positives, the query itself.
        positive_scores: [q] score of the query's positive, of several the lowest (`lowest_scores`).
        query_ids: [q] int64; needed where settings.sample_seed is set: a query's draw depends on the seed, its own id
            and its candidates' ids alone, so it is the same in every layout.

    Raises ValueError for sizes that don't fit or positive scores that are not finite (only where a margin is set).
    """
    num_queries = len(scores)
    if scores.shape != ids.shape or len(known) != num_queries or len(positive_scores) != num_queries:
        raise ValueError(
            f"scores {scores.shape}, ids {ids.shape}, known ({len(known)}) and positive_scores "
            f"({len(positive_scores)}) must be of the same queries"
        )
    if settings.margin is not None and not np.isfinite(positive_scores).all():
        raise ValueError(
            f"positive score of query {int(np.flatnonzero(~np.isfinite(positive_scores))[0])} is not finite; the positive must "
            "be in the searched corpus"
        )
    real = ids >= 0
    is_known = real & _contains(ids, known)
    candidate = real & ~is_known
    place = np.cumsum(candidate, axis=1) - 1  # [q, n]: number of candidates before this one
    beyond = candidate & (place >= (scores.shape[1] if settings.window is None else settings.window))
    skipped = candidate & ~beyond & (place < settings.skip_top)
    candidate &= ~beyond & ~skipped
    too_close = candidate & (scores > margin_limit(positive_scores, settings)[:, None])
    candidate &= ~too_close
    too_high = candidate & (scores > (np.inf if settings.ceiling is None else settings.ceiling))
    candidate &= ~too_high
    rejected = np.stack([r.sum(axis=1) for r in (is_known, beyond, skipped, too_close, too_high)], axis=1)
    pool_ids, pool_scores = _take(scores, ids, candidate, settings, query_ids)
    return Selection(pool_ids, pool_scores, (pool_ids < 0).sum(axis=1), rejected.astype(np.int64))


def _contains(ids: np.ndarray, known: Ragged) -> np.ndarray:
    """[q, n] bool: is ids[i, j] in list i of `known`?"""
    if ids.size == 0 or len(known.values) == 0:
        return np.zeros(ids.shape, dtype=bool)
    width = max(int(ids.max()), int(known.values.max())) + 1
    known_keys = np.sort(known.owner * width + known.values)
    keys = np.where(ids >= 0, np.arange(len(ids), dtype=np.int64)[:, None] * width + ids, -1)
    place = np.searchsorted(known_keys, keys).clip(max=len(known_keys) - 1)
    return known_keys[place] == keys


def _take(
    scores: np.ndarray,
    ids: np.ndarray,
    candidate: np.ndarray,
    settings: SelectionSettings,
    query_ids: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The first (or drawn) pool_size candidates of each row, in the order of the row."""
    num_queries, width = ids.shape
    if settings.sample_seed is not None:
        if query_ids is None:
            raise ValueError("sample_seed is set, so query_ids must be given")
        key = np.where(candidate, _mix(query_ids, ids, settings.sample_seed), np.uint64(np.iinfo(np.uint64).max))
        order = np.argsort(key, axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(width)[None], axis=1)
        candidate = candidate & (rank < settings.pool_size)
    place = np.cumsum(candidate, axis=1) - 1
    row, column = np.nonzero(candidate & (place < settings.pool_size))
    pool_ids = np.full((num_queries, settings.pool_size), -1, np.int64)
    pool_scores = np.full((num_queries, settings.pool_size), -np.inf, np.float32)
    pool_ids[row, place[row, column]] = ids[row, column]
    pool_scores[row, place[row, column]] = scores[row, column]
    return pool_ids, pool_scores


def _mix(query_ids: np.ndarray, ids: np.ndarray, seed: int) -> np.ndarray:
    """A random number for every (seed, query, id): [q, n] uint64, by splitmix64."""
    mixed_query = _splitmix(query_ids.astype(np.uint64) + np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
    return _splitmix(mixed_query[:, None] + ids.astype(np.uint64))


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
