"""From embeddings to a pool of hard negatives for every query: search over all ranks, select, bring together.

Shapes: `R` rows of the source, `u` distinct queries, `P` pool size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from megatron_conan.data.pairs import PairStore
from megatron_conan.data.ragged import Ragged
from megatron_conan.mining.encode import EmbeddedTexts
from megatron_conan.mining.exchange import gather_counts, gather_rows
from megatron_conan.mining.local_search import SearchSettings
from megatron_conan.mining.select import REASONS, SHORT_REASONS, SelectionSettings, lowest_scores, select_negatives
from megatron_conan.mining.shards import ShardedIndex
from megatron_conan.parallel.context import ParallelContext

SHOWN_CHARACTERS = 60
GATHERED_ROWS = 65536
"""Queries of each rank whose pools are exchanged at a time."""


@dataclass(frozen=True)
class MiningSource:
    """Queries, their positives, and the documents among which negatives are looked for. Equal texts have equal ids."""

    name: str
    query_ids: np.ndarray
    """[u] int64 ids of the distinct queries, rising."""
    query_of_row: np.ndarray
    """[R] int64 place in `query_ids` of each row's query."""
    positives: Ragged
    """u lists of text ids: the positives of all rows with this query, rising, none twice."""
    document_ids: np.ndarray
    """[n] int64, rising."""
    describe: Callable[[int], str]
    """Text id -> words for messages."""

    @classmethod
    def of_rows(
        cls,
        name: str,
        row_query: np.ndarray,
        row_positives: Ragged,
        document_ids: np.ndarray,
        describe: Callable[[int], str],
        order: np.ndarray | None = None,
    ) -> MiningSource:
        """Bring rows with the same query together.

        Args:
            row_query: [R] int64 text id of each row's query.
            row_positives: R lists of text ids.
            order: [R] rows in the order of their queries' ids, if known.
        """
        if order is None:
            order = np.argsort(row_query, kind="stable")
        sorted_query = np.asarray(row_query)[order]
        first = np.append(True, sorted_query[1:] != sorted_query[:-1])[: len(sorted_query)]
        place = np.cumsum(first) - 1  # [R] in the order of `order`
        query_of_row = np.empty(len(order), np.int64)
        query_of_row[order] = place
        taken = row_positives.take(np.asarray(order))
        width = int(taken.values.max(initial=0)) + 1
        keys = np.unique(place[taken.owner] * width + taken.values)
        counts = np.bincount(keys // width, minlength=int(first.sum()))
        positives = Ragged(keys % width, np.append(0, np.cumsum(counts)))
        return cls(name, sorted_query[first], query_of_row, positives, np.asarray(document_ids), describe)

    def check(self, num_negatives: int) -> None:
        """Refuse what can't be mined, before anything is encoded.

        Raises:
            ValueError: for too few documents, or positives that are none.
        """
        if len(self.document_ids) <= num_negatives:
            raise ValueError(
                f"{self.name} has {len(self.document_ids)} documents, too few for {num_negatives} negatives a query beside its "
                "positive; add documents (--corpus), or ask for fewer negatives"
            )
        place = np.searchsorted(self.document_ids, self.positives.values).clip(max=len(self.document_ids) - 1)
        lost = np.flatnonzero(self.document_ids[place] != self.positives.values)
        if len(lost):
            query = int(self.query_ids[self.positives.owner[lost[0]]])
            raise ValueError(
                f"{self.name}: {len(lost)} positives are not among its documents, for example "
                f"{self.describe(int(self.positives.values[lost[0]]))} of query {self.describe(query)}; write the data again "
                "with data_tools/preprocess_pairs.py"
            )

    @classmethod
    def of_store(cls, store: PairStore) -> MiningSource:
        """The retrieval rows of a pair store. Raises ValueError if it has none, or no documents."""
        if store.task != "retrieval":
            raise ValueError(
                f"{store.name} holds {store.task} rows, which have no negatives to mine; mine retrieval data"
            )
        if len(store.corpus_ids) == 0 or store.num_rows == 0:
            raise ValueError(
                f"{store.name} has {store.num_rows} rows and {len(store.corpus_ids)} documents; nothing can be mined"
            )

        def describe(text_id: int) -> str:
            return f"text {text_id} ({shortened(store.text(text_id))})"

        return cls.of_rows(
            store.name,
            store.query_ids,
            Ragged(store.positive_ids, store.positive_offsets),
            store.corpus_ids,
            describe,
            store.query_order,
        )


@dataclass(frozen=True)
class Pools:
    """What was found; the same on all ranks."""

    ids: np.ndarray
    """[u, P] int64 text ids, best first, -1 where there are fewer."""
    scores: np.ndarray
    """[u, P] float32, -inf where there are fewer."""
    positive_scores: np.ndarray
    """[u] float32 score of the query's lowest positive."""
    short_reasons: np.ndarray
    """[u] int32 place in SHORT_REASONS of why a pool is incomplete; -1 where it is not."""
    rejected: np.ndarray
    """[u, len(REASONS)] int32 search results turned down, by reason."""
    compared_scores: np.ndarray
    """[u, c] float32 scores of the documents that `compared` named; NaN for none."""
    shard_sizes: list[int]
    """Documents of every rank."""

    def count_short(self) -> dict[str, int]:
        """Number of queries with an incomplete pool, by main reason."""
        counts = np.bincount(self.short_reasons[self.short_reasons >= 0], minlength=len(SHORT_REASONS))
        return {name: int(count) for name, count in zip(SHORT_REASONS, counts, strict=True) if count}


def mine_pools(
    source: MiningSource,
    documents: EmbeddedTexts,
    queries: Iterable[EmbeddedTexts],
    context: ParallelContext,
    selection: SelectionSettings,
    *,
    search: SearchSettings | None = None,
    compared: np.ndarray | None = None,
) -> Pools:
    """Search every query's nearest documents and choose its pool. All ranks of the world must call.

    Args:
        source: the same on all ranks.
        documents: this rank's documents.
        queries: this rank's queries, in equally many parts on every rank; nothing is kept of a part that is done.
        compared: [u, c] int64 further document ids, -1 for none, whose scores are wanted too.

    Raises:
        ValueError: on all ranks, where a GPU has too little memory (`check_search` tells that before the encoding).
    """
    with ShardedIndex(documents, context, settings=search) as index:
        compared = np.empty((len(source.query_ids), 0), np.int64) if compared is None else compared
        parts = [_no_queries(selection.pool_size, compared.shape[1])]
        parts += [_search_part(source, index, part, selection, compared) for part in queries]
    place, *columns = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    del parts
    ids, scores, lowest, reasons, rejected, scored = _gather(context, place, columns, len(source.query_ids))
    return Pools(ids, scores, lowest, reasons, rejected, scored, index.shard_sizes)


def shortened(text: str) -> str:
    """The beginning of a text in quotes, on one line."""
    line = " ".join(text.split())
    return f'"{line[:SHOWN_CHARACTERS]}{"…" if len(line) > SHOWN_CHARACTERS else ""}"'


def _with_query(positives: Ragged, query_ids: np.ndarray) -> Ragged:
    """The known documents of each query: its positives, and itself."""
    order = np.argsort(np.append(positives.owner, np.arange(len(query_ids))), kind="stable")
    values = np.append(positives.values, query_ids)[order]
    return Ragged(values, np.append(0, np.cumsum(positives.counts + 1)))


def _no_queries(pool_size: int, num_compared: int) -> tuple[np.ndarray, ...]:
    """Places, and what Pools holds of each query, for none."""
    return (
        np.empty(0, np.int64),
        np.empty((0, pool_size), np.int64),
        np.empty((0, pool_size), np.float32),
        np.empty(0, np.float32),
        np.empty(0, np.int32),
        np.empty((0, len(REASONS)), np.int32),
        np.empty((0, num_compared), np.float32),
    )


def _search_part(
    source: MiningSource,
    index: ShardedIndex,
    queries: EmbeddedTexts,
    selection: SelectionSettings,
    compared: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Places of these queries, and what Pools holds of each."""
    place = np.searchsorted(source.query_ids, queries.ids)
    # a block of the search returns as many results as its most demanding query needs: those stay together
    order = np.argsort(source.positives.counts[place], kind="stable")
    place, query_ids, embeddings = place[order], queries.ids[order], queries.embeddings[order]
    positives = source.positives.take(place)
    known = _with_query(positives, query_ids)
    lowest = lowest_scores(index.score_pairs(embeddings, positives), positives.offsets)
    others = compared[place]
    wanted = Ragged(others.ravel(), np.arange(len(others) + 1) * others.shape[1])
    compared_scores = index.score_pairs(embeddings, wanted).reshape(others.shape)
    # A query's positives and the query itself don't count, so there must be room for them.
    num_documents = len(source.document_ids)
    window = num_documents if selection.window is None else selection.window
    width = np.minimum(window + known.counts, num_documents)
    parts = [_no_queries(selection.pool_size, compared.shape[1])[1:6]]
    for found in index.search_blocks(embeddings, width):
        own = found.queries
        ids = np.where(np.arange(found.ids.shape[1]) < width[own][:, None], found.ids, -1)  # no more than asked for
        chosen = select_negatives(found.scores, ids, known.take(own), lowest[own], selection, query_ids[own])
        reasons, rejected = chosen.short_reason().astype(np.int32), chosen.rejected.astype(np.int32)
        parts.append((chosen.ids, chosen.scores, lowest[own], reasons, rejected))
    return place, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)), compared_scores


def _gather(
    context: ParallelContext, place: np.ndarray, arrays: list[np.ndarray], num_queries: int
) -> list[np.ndarray]:
    """Bring the rows of all ranks' queries to all ranks, some at a time: m rows each -> u rows each."""
    counts = gather_counts([len(place)], context.world_group, context.world_size, context.device)[:, 0]
    whole = [np.empty((num_queries, *array.shape[1:]), array.dtype) for array in arrays]
    seen = np.zeros(num_queries, np.int64)
    for start in range(0, int(counts.max()), GATHERED_ROWS):
        parts = np.clip(counts - start, 0, GATHERED_ROWS).tolist()
        own = slice(start, start + GATHERED_ROWS)
        places = np.concatenate(gather_rows(place[own], parts, context.world_group, context.device))
        np.add.at(seen, places, 1)
        for result, array in zip(whole, arrays, strict=True):
            result[places] = np.concatenate(gather_rows(array[own], parts, context.world_group, context.device))
    if (seen != 1).any():
        raise RuntimeError(f"{counts.sum()} pools for {num_queries} queries: the ranks did not encode disjoint parts")
    return whole
