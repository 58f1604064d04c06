"""Exact nearest-document search over an index that is spread over all ranks.

Shapes: `e` embedding dim, `m` queries of this rank, `b` queries of all ranks in one block, `k` documents a query,
`w` ranks, `n` documents of this rank's shard.
Order of results everywhere: higher score first, lower id first among equal scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_conan.mining.exchange import gather_counts, gather_rows, return_rows
from megatron_conan.model.backends import import_faiss
from megatron_conan.parallel.context import ParallelContext

# GPU faiss returns at most 2048 neighbours, and one more than asked for is needed to see a tie at the end of the list.
GPU_MAX_K = 2047
# Scores held at once (float32) when a tie at the end of the list makes a query compare with the whole shard.
TIE_BLOCK_SCORES = 1 << 24
NUM_IDS_SHOWN = 5


def canonical_top(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort every row by (-score, id) and cut to k columns. scores [q, c] float32, ids [q, c] int64; c >= k."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


class ShardedIndex:
    """Inner-product search over the documents of all ranks; equal to one flat index over all of them.

    The shard lies in faiss (on the GPU where faiss has one and the rank has one) and in host memory (float32). All
    ranks of the world must make the same calls in the same order; shards and queries may be uneven or empty.
    """

    def __init__(
        self, local_ids: np.ndarray, embeddings: np.ndarray, context: ParallelContext, block_size: int = 4096
    ) -> None:
        """Build this rank's shard.

        Args:
            local_ids: [n] int64 ids, unique over all ranks.
            embeddings: [n, e] float32.
            context: the grid of ranks.
            block_size: queries (of all ranks together) searched at once.

        Raises ValueError, on all ranks, for embeddings that are not finite (naming texts) or of unequal width.
        """
        if len(local_ids) != len(embeddings):
            raise ValueError(f"{len(local_ids)} ids but {len(embeddings)} embeddings; give one row an id")
        self._context = context
        self._block_size = block_size
        order = np.argsort(local_ids, kind="stable")
        self._ids = np.asarray(local_ids, dtype=np.int64)[order]
        rows = np.ascontiguousarray(embeddings[order], dtype=np.float32)
        bad_ids = self._ids[~np.isfinite(rows).all(axis=1)]
        described = self._gather([len(rows), rows.shape[1] if len(rows) else 0, len(bad_ids), *_pad_ids(bad_ids)])
        self.shard_sizes: list[int] = described[:, 0].tolist()
        self._width = _common_width(described[:, 1], "embeddings")
        if described[:, 2].any():
            shown = sorted(described[:, 3:][described[:, 3:] >= 0].tolist())[:NUM_IDS_SHOWN]
            raise ValueError(
                f"embeddings of {int(described[:, 2].sum())} texts are not finite, among them text ids {shown}; "
                "the model has diverged or these texts overflow: lower the learning rate or look at the texts"
            )
        self._rows = rows if len(rows) else np.empty((0, self._width), np.float32)
        faiss = import_faiss()
        self._index = faiss.IndexFlatIP(self._width)
        self._on_gpu = context.device.type == "cuda" and getattr(faiss, "get_num_gpus", int)() > 0
        if self._on_gpu:
            self._gpu_resources = faiss.StandardGpuResources()
            self._index = faiss.index_cpu_to_gpu(self._gpu_resources, context.device.index or 0, self._index)
        if len(rows):
            self._index.add(rows)

    @property
    def max_k(self) -> int:
        """The largest k that `search` takes on this rank."""
        return GPU_MAX_K if self._on_gpu else np.iinfo(np.int32).max

    def search(self, local_queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k best documents of all ranks for this rank's queries.

        Args:
            local_queries: [m, e] float32; m may differ between ranks and be 0.
            k: documents a query, the same on all ranks.

        Returns (scores [m, k] float32, ids [m, k] int64), padded with -inf and -1 where there are fewer than k
        documents. Raises ValueError for k outside 1..max_k, and on all ranks for queries that are not finite.
        """
        if not 1 <= k <= self.max_k:
            raise ValueError(f"k={k} must be 1 to {self.max_k} (GPU faiss can't return more); lower the window")
        scores = np.full((len(local_queries), k), -np.inf, np.float32)
        ids = np.full((len(local_queries), k), -1, np.int64)
        for own, queries, counts in self._query_blocks(local_queries):
            found_scores, found_ids = self._search_shard(queries, k)
            # w x [m, k] -> [m, w * k]
            all_scores = np.concatenate(self._return(found_scores, counts), axis=1)
            all_ids = np.concatenate(self._return(found_ids, counts), axis=1)
            scores[own], ids[own] = canonical_top(all_scores, all_ids, k)
        return scores, ids

    def score_pairs(self, local_queries: np.ndarray, pair_ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Inner products of this rank's queries with documents named by id, wherever these lie.

        Args:
            local_queries: [m, e] float32.
            pair_ids: [p] int64 document ids, those of query i at offsets[i]:offsets[i + 1].
            offsets: [m + 1] int64.

        Returns [p] float32; NaN for an id that no shard holds. All ranks must call.
        """
        scores = np.full(len(pair_ids), np.nan, np.float32)
        for own, queries, _ in self._query_blocks(local_queries):
            pairs = slice(offsets[own.start], offsets[own.stop])
            lengths = np.diff(offsets[own.start : own.stop + 1])
            counts = self._gather([len(lengths), pairs.stop - pairs.start])
            per_query = np.concatenate(self._gather_rows(lengths, counts[:, 0].tolist()))
            wanted = np.concatenate(self._gather_rows(pair_ids[pairs], counts[:, 1].tolist()))
            answers = np.stack(self._return(self._score_held(queries, wanted, per_query), counts[:, 1].tolist()))
            # [w, p] -> [p]: one shard at most holds an id
            held = ~np.isnan(answers)
            scores[pairs] = np.where(held.any(axis=0), np.where(held, answers, 0).sum(axis=0), np.nan)
        return scores

    def _score_held(self, queries: np.ndarray, wanted: np.ndarray, per_query: np.ndarray) -> np.ndarray:
        """Scores [p] of the wanted documents that lie here, NaN for the others; per_query[i] belong to query i."""
        scores = np.full(len(wanted), np.nan, np.float32)
        if len(self._ids):
            row = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
            held = self._ids[row] == wanted
            owner = np.repeat(np.arange(len(queries)), per_query)[held]
            scores[held] = np.einsum("pe,pe->p", queries[owner], self._rows[row[held]])
        return scores

    def _query_blocks(self, local_queries: np.ndarray) -> Iterator[tuple[slice, np.ndarray, list[int]]]:
        """Bring the ranks' queries together in blocks.

        Yields (which of this rank's queries, all ranks' queries of the block [b, e], how many each rank gave).
        """
        bad = np.flatnonzero(~np.isfinite(local_queries).all(axis=1))
        width = local_queries.shape[1] if len(local_queries) else 0
        described = self._gather([len(local_queries), width, len(bad)])
        width = _common_width(np.append(described[:, 1], self._width if sum(self.shard_sizes) else 0), "queries")
        if described[:, 2].any():
            raise ValueError(f"embeddings of {described[:, 2].tolist()} queries (by rank) are not finite")
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
        asked = min(k + 1, size)
        found, rows = self._index.search(queries, asked)
        kept = min(k, size)
        scores[:, :kept], ids[:, :kept] = canonical_top(found, self._ids[rows], kept)
        if size > k:
            # faiss keeps any of several equal documents, so a tie across the end of the list is settled by id here.
            tied = np.flatnonzero(scores[:, k - 1] == found.min(axis=1))
            per_block = max(1, TIE_BLOCK_SCORES // size)
            for start in range(0, len(tied), per_block):
                block = tied[start : start + per_block]
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


def _pad_ids(ids: np.ndarray) -> list[int]:
    shown = ids[:NUM_IDS_SHOWN].tolist()
    return shown + [-1] * (NUM_IDS_SHOWN - len(shown))


def _common_width(widths: np.ndarray, what: str) -> int:
    """The one embedding dim of all ranks that have rows (0 if none has)."""
    present = sorted(set(widths[widths > 0].tolist()))
    if len(present) > 1:
        raise ValueError(f"{what} have different widths: {present}; one model gives one width")
    return present[0] if present else 0
