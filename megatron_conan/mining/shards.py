"""Exact nearest-document search over an index that is spread over all ranks.

Shapes: `e` embedding dim, `m` queries of this rank, `b` queries of all ranks in one block, `k` documents a query,
`w` ranks, `n` documents of this rank's shard.
Order of results everywhere: higher score first, lower id first among equal scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from megatron_conan.data.ragged import Ragged
from megatron_conan.mining.encode import EmbeddedTexts
from megatron_conan.mining.exchange import gather_counts, gather_rows, return_rows
from megatron_conan.mining.local_search import HostSearch, SearchSettings, agree, largest_k, local_search
from megatron_conan.parallel.context import ParallelContext

# Numbers (float32) held at once where queries are compared with single documents, or with the whole shard because of a tie.
BLOCK_NUMBERS = 1 << 24
TIE_FACTOR = 8
"""How many times more results are asked for where a tie reaches the end of the list, before the whole shard is compared."""


@dataclass(frozen=True)
class FoundDocuments:
    """Results of a block of this rank's queries."""

    queries: slice
    """Which of this rank's queries."""
    scores: np.ndarray
    """[queries, k] float32, falling; -inf where there are fewer documents."""
    ids: np.ndarray
    """[queries, k] int64; -1 where there are fewer documents."""


def canonical_top(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort every row by (-score, id) and cut to k columns. scores [q, c] float32, ids [q, c] int64; c >= k."""
    order = np.argsort(-scores, axis=1, kind="stable")  # quick on rows that are made of sorted runs
    scores, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    tied = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))
    if len(tied):
        order = np.lexsort((ids[tied], -scores[tied]), axis=-1)
        ids[tied] = np.take_along_axis(ids[tied], order, axis=1)  # the scores stay: only equal ones changed places
    return scores[:, :k], ids[:, :k]


class ShardedIndex:
    """Inner-product search over the documents of all ranks; equal to one flat index over all of them.

    The shard lies in host memory or in a memory-mapped file, and on the GPU where faiss has one and the rank has one. All
    ranks of the world must make the same calls in the same order; shards and queries may be uneven or empty.
    Close it, or use it in a `with` block, so that memory on the GPU is given back.
    """

    def __init__(
        self,
        documents: EmbeddedTexts,
        context: ParallelContext,
        block_size: int = 4096,
        settings: SearchSettings | None = None,
    ) -> None:
        """Search over this rank's shard and all others.

        Args:
            documents: ids unique over all ranks, finite embeddings; kept, not copied.
            context: the grid of ranks.
            block_size: queries (of all ranks together) searched at once.
            settings: what the search may use of the GPU.

        Raises ValueError, on all ranks, for embeddings of unequal width, or a GPU that has too little memory.
        """
        self._ids, self._rows = documents.ids, documents.embeddings
        if len(self._ids) != len(self._rows) or (np.diff(self._ids) <= 0).any():
            raise ValueError(f"{len(self._ids)} ids for {len(self._rows)} embeddings; give one row an id, ids rising")
        self._context = context
        self._block_size = block_size
        problem = ""
        try:
            self._search = local_search(self._rows, context.device, settings or SearchSettings())
        except (RuntimeError, ValueError) as error:  # a GPU out of memory, on one rank possibly
            problem = f"the search can't start on rank {context.rank}: {error}"
        agree(problem, context)
        described = self._gather([len(self._rows), self._rows.shape[1] if len(self._rows) else 0])
        self.shard_sizes: list[int] = described[:, 0].tolist()
        self._width = _common_width(described[:, 1], "embeddings")
        self.max_k = largest_k(context.device)
        """The largest k that `search` takes."""

    def __enter__(self) -> ShardedIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._search.close()

    def search(self, local_queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k best documents of all ranks for this rank's queries.

        Args:
            local_queries: [m, e] float32; m may differ between ranks and be 0.
            k: documents a query, the same on all ranks.

        Returns (scores [m, k] float32, ids [m, k] int64), padded with -inf and -1 where there are fewer than k
        documents. Raises ValueError for k outside 1..max_k.
        """
        if not 1 <= k <= self.max_k:
            raise ValueError(f"k={k} must be 1 to {self.max_k} (GPU faiss can't return more); lower the window")
        blocks = list(self.search_blocks(local_queries, np.full(len(local_queries), k)))
        if not blocks:
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        return np.concatenate([block.scores for block in blocks]), np.concatenate([block.ids for block in blocks])

    def search_blocks(self, local_queries: np.ndarray, k: np.ndarray) -> Iterator[FoundDocuments]:
        """The same block by block, for results that would not fit into memory all at once.

        Args:
            local_queries: [m, e] float32.
            k: [m] int64 documents of each query; a block gets the largest of all its ranks' queries, so queries with a
                similar k should be neighbours. Above max_k the host searches, where the GPU can't.

        Yields results of this rank's queries, in their order; every rank gets equally many blocks, some of them empty.
        """
        for own, queries, counts in self._query_blocks(local_queries):
            widest = int(self._gather([int(k[own].max(initial=1))]).max())
            found_scores, found_ids = self._search_shard(queries, widest)
            # w x [m, k] -> [m, w * k]
            all_scores = np.concatenate(self._return(found_scores, counts), axis=1)
            all_ids = np.concatenate(self._return(found_ids, counts), axis=1)
            if self._context.world_size > 1:
                all_scores, all_ids = canonical_top(all_scores, all_ids, widest)
            yield FoundDocuments(own, all_scores, all_ids)

    def score_pairs(self, local_queries: np.ndarray, pairs: Ragged) -> np.ndarray:
        """Inner products of this rank's queries with documents named by id, wherever these lie.

        Args:
            local_queries: [m, e] float32.
            pairs: m lists of document ids.

        Returns [number of pairs] float32; NaN for an id that no shard holds. All ranks must call.
        """
        scores = np.full(len(pairs.values), np.nan, np.float32)
        for own, queries, _ in self._query_blocks(local_queries):
            place = slice(pairs.offsets[own.start], pairs.offsets[own.stop])
            lengths = np.diff(pairs.offsets[own.start : own.stop + 1])
            counts = self._gather([len(lengths), place.stop - place.start])
            per_query = np.concatenate(self._gather_rows(lengths, counts[:, 0].tolist()))
            wanted = np.concatenate(self._gather_rows(pairs.values[place], counts[:, 1].tolist()))
            answers = np.stack(self._return(self._score_held(queries, wanted, per_query), counts[:, 1].tolist()))
            # [w, p] -> [p]: one shard at most holds an id
            held = ~np.isnan(answers)
            scores[place] = np.where(held.any(axis=0), np.where(held, answers, 0).sum(axis=0), np.nan)
        return scores

    def _score_held(self, queries: np.ndarray, wanted: np.ndarray, per_query: np.ndarray) -> np.ndarray:
        """Scores [p] of the wanted documents that lie here, NaN for the others; per_query[i] belong to query i."""
        scores = np.full(len(wanted), np.nan, np.float32)
        if len(self._ids):
            row = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
            held = np.flatnonzero(self._ids[row] == wanted)
            owner = np.repeat(np.arange(len(queries)), per_query)
            at_once = max(1, BLOCK_NUMBERS // self._width)
            for begin in range(0, len(held), at_once):
                part = held[begin : begin + at_once]
                scores[part] = np.einsum("pe,pe->p", queries[owner[part]], self._rows[row[part]])
        return scores

    def _query_blocks(self, local_queries: np.ndarray) -> Iterator[tuple[slice, np.ndarray, list[int]]]:
        """Bring the ranks' queries together in blocks.

        Yields (which of this rank's queries, all ranks' queries of the block [b, e], how many each rank gave).
        """
        described = self._gather([len(local_queries), local_queries.shape[1] if len(local_queries) else 0])
        width = _common_width(np.append(described[:, 1], self._width if sum(self.shard_sizes) else 0), "queries")
        queries = np.ascontiguousarray(local_queries, np.float32).reshape(len(local_queries), width)
        sizes = described[:, 0]
        per_rank = max(1, self._block_size // self._context.world_size)
        for start in range(0, int(sizes.max()), per_rank):
            counts = np.clip(sizes - start, 0, per_rank).tolist()
            first = min(start, len(queries))
            own = slice(first, first + counts[self._context.rank])
            yield own, np.concatenate(self._gather_rows(queries[own], counts)), counts

    def _search_shard(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact top k of this shard in canonical order, [b, k] each, padded with -inf and -1."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        size = len(self._ids)
        if size == 0 or len(queries) == 0:
            return scores, ids
        search = self._search if k <= self._search.max_k else HostSearch(self._rows)
        kept, asked, pending = min(k, size), min(k + 1, size), np.arange(len(queries))
        while len(pending):
            found, rows = search.search(queries[pending], asked)
            scores[pending, :kept], ids[pending, :kept] = canonical_top(found, self._ids[rows], kept)
            if asked == size:
                return scores, ids
            # faiss keeps any of several equal documents: a tie that reaches the end of the list may go on behind it
            pending = pending[scores[pending, k - 1] == found.min(axis=1)]
            if TIE_FACTOR * asked > min(search.max_k, size // 2):
                break
            asked *= TIE_FACTOR
        per_block = max(1, BLOCK_NUMBERS // size)
        for start in range(0, len(pending), per_block):
            block = pending[start : start + per_block]
            scores[block], ids[block] = self._search_ties(queries[block], k)
        return scores, ids

    def _search_ties(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Top k by comparing with the whole shard; rows lie in order of ids, so the first of equals is the lowest."""
        all_scores = queries @ self._rows.T  # [b, n]
        scores = np.empty((len(queries), k), np.float32)
        ids = np.empty((len(queries), k), np.int64)
        threshold = np.partition(all_scores, -k, axis=1)[:, -k]
        for i, row in enumerate(all_scores):
            above = np.flatnonzero(row > threshold[i])
            equal = np.flatnonzero(row == threshold[i])[: k - len(above)]
            chosen = np.concatenate([above, equal])
            best_scores, best_ids = canonical_top(row[None, chosen], self._ids[None, chosen], k)
            scores[i], ids[i] = best_scores[0], best_ids[0]
        return scores, ids

    def _gather(self, values: list[int]) -> np.ndarray:
        return gather_counts(values, self._context.world_group, self._context.world_size, self._context.device)

    def _gather_rows(self, rows: np.ndarray, counts: list[int]) -> list[np.ndarray]:
        return gather_rows(rows, counts, self._context.world_group, self._context.device)

    def _return(self, rows: np.ndarray, counts: list[int]) -> list[np.ndarray]:
        return return_rows(rows, counts, self._context.rank, self._context.world_group, self._context.device)


def _common_width(widths: np.ndarray, what: str) -> int:
    """The one embedding dim of all ranks that have rows (0 if none has)."""
    present = sorted(set(widths[widths > 0].tolist()))
    if len(present) > 1:
        raise ValueError(f"{what} have different widths: {present}; one model gives one width")
    return present[0] if present else 0
