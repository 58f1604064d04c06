"""The rows of one global batch as distinct texts and the relations between them.

Every rank makes the same global batch; which rank embeds which text is settled later and changes no loss. A text stands in it
once, however many rows it belongs to: so a batch holds no duplicates, and what the data names a positive of a query is
no negative of it, whichever row brought it along.

Legend: R rows of a source, q rows of the batch, a distinct queries, d distinct documents, p positives, m negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_conan.data.format import TextKind
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.ragged import ranges

NO_PAIRS = np.empty((2, 0), np.int64)
HUB_QUERIES = 32
"""A text related to more queries of a batch than this is a hub."""


@dataclass(frozen=True)
class PairBatch:
    """Rows of one source over all ranks. All arrays are int64 unless said otherwise."""

    store: PairStore
    rows: np.ndarray
    """[q] row numbers in the source."""
    query_ids: np.ndarray
    """[a] text ids, rising."""
    document_ids: np.ndarray
    """[d] text ids, rising."""
    row_query: np.ndarray
    """[q] place in `query_ids` of each row's query."""
    positive: np.ndarray
    """[2, p] (row of the batch, document), rows rising; every row has one at least."""
    negative: np.ndarray
    """[2, m] (row of the batch, document): the hard negatives, rows rising."""
    slots: np.ndarray
    """[m] slot in the table of mined negatives; -1 for negatives that are not mined."""
    related: np.ndarray
    """[2, n] (query, document) that are no negatives of each other, sorted: what any row of the source, in the batch or not,
    names a positive of the query, and the query's own text."""
    alike: np.ndarray
    """[2, n] (query, query) that are no negatives of each other, sorted, each with itself: one's related texts are the
    other's. Those that share a hub are left out."""
    hubs: np.ndarray
    """[a, k] ids of the texts related to a query and to more than HUB_QUERIES in all, -1 behind the last. Queries with a
    common hub are alike: listing such pairs (labels as documents, say) would take the square of the batch."""
    scores: np.ndarray
    """[q] float32 similarity labels (sts), NaN elsewhere."""
    query_labels: np.ndarray | None = None
    """[a] class of each query (classification)."""
    document_labels: np.ndarray | None = None
    """[d] class of each document (classification)."""

    @property
    def task(self) -> str:
        """retrieval, classification or sts."""
        return self.store.task

    @property
    def num_texts(self) -> int:
        """a + d."""
        return len(self.query_ids) + len(self.document_ids)

    def text(self, index: int) -> tuple[TextKind, int]:
        """Kind and text id of the batch's texts 0 .. num_texts - 1: queries first, then documents."""
        if index < len(self.query_ids):
            return "query", int(self.query_ids[index])
        return "document", int(self.document_ids[index - len(self.query_ids)])


def build_pair_batch(
    store: PairStore,
    rows: np.ndarray,
    rng: np.random.Generator,
    *,
    num_positives: int = 1,
    num_negatives: int = 0,
    mined: np.ndarray | None = None,
) -> PairBatch:
    """Make a global batch of some rows.

    Args:
        store: pair data of task retrieval, classification or sts.
        rows: [q] row numbers.
        rng: settles every random choice; in the same state on all ranks.
        num_positives: most positives a row brings along; a random choice if it has more.
        num_negatives: most hard negatives a row brings along (classification: texts of other classes).
        mined: [q, K] text ids from a table of mined negatives, -1 for an empty slot, in place of the file's negatives.

    Raises:
        ValueError: for sft rows, or `mined` of another shape.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if store.task == "sft":
        raise ValueError(f"{store.prefix} holds sft rows, which are no pairs; use it in the sft stage")
    if mined is not None and mined.shape[:1] != rows.shape:
        raise ValueError(f"mined negatives have shape {mined.shape}; expected [{len(rows)}, K], one line a row")
    query_ids, row_query = np.unique(store.query_ids[rows], return_inverse=True)
    if store.task == "classification":
        positive, negative = _draw_by_class(store, rows, rng, num_positives, num_negatives)
        known = NO_PAIRS
    else:
        positive = _draw(store.positive_ids, store.positive_offsets, rows, num_positives, rng)
        negative = _draw(store.negative_ids, store.negative_offsets, rows, num_negatives, rng)
        known = _known_positives(store, query_ids)
    slots = np.full(negative.shape[1], -1, dtype=np.int64)
    if mined is not None:
        row, slots = np.nonzero(mined >= 0)
        negative = np.stack([row, mined[row, slots]])
    document_ids, place = np.unique(np.concatenate([positive[1], negative[1]]), return_inverse=True)
    positive = np.stack([positive[0], place[: positive.shape[1]]])
    negative = np.stack([negative[0], place[positive.shape[1] :]])
    own_text = np.stack([np.arange(len(query_ids)), query_ids])
    known = np.unique(np.concatenate([known, own_text], axis=1), axis=1)
    related = _related(known, document_ids)
    alike, hubs = _alike(known, len(query_ids))
    # another row of the same query may name a negative of this one as a positive
    kept = ~_contains(related, np.stack([row_query[negative[0]], negative[1]]), len(document_ids))
    return PairBatch(
        store=store,
        rows=rows,
        query_ids=query_ids,
        document_ids=document_ids,
        row_query=row_query,
        positive=positive,
        negative=negative[:, kept],
        slots=slots[kept],
        related=related,
        alike=alike,
        hubs=hubs,
        scores=np.full(len(rows), np.nan, np.float32) if store.scores is None else store.scores[rows],
        **_labels(store, rows, row_query, query_ids, document_ids),
    )


def _rows_values(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[2, n] (place in `rows`, value) of all values of the rows, in order."""
    row, index = ranges(np.asarray(offsets[rows], dtype=np.int64), np.asarray(offsets[rows + 1], dtype=np.int64))
    return np.stack([row, np.asarray(values[index], dtype=np.int64)])


def _draw(
    values: np.ndarray, offsets: np.ndarray, rows: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """[2, n] (place in `rows`, value): at most `count` values a row in their order; a random choice if there are more."""
    found = _rows_values(values, offsets, rows)
    order = np.lexsort((rng.random(found.shape[1]), found[0]))
    first = np.searchsorted(found[0], found[0])  # where each row's values begin; the same before and after ordering
    return found[:, np.sort(order[np.arange(len(order)) - first < count])]


def _draw_by_class(
    store: PairStore, rows: np.ndarray, rng: np.random.Generator, num_positives: int, num_negatives: int
) -> tuple[np.ndarray, np.ndarray]:
    """([2, p], [2, m]) (place in `rows`, text id): other texts of each row's class, and texts of other classes."""
    assert store.labels is not None
    assert store.label_rows is not None
    assert store.label_offsets is not None
    label = np.asarray(store.labels[rows], dtype=np.int64)
    begin, end = (np.asarray(store.label_offsets[label + i], dtype=np.int64) for i in (0, 1))
    place = np.repeat(np.arange(len(rows)), num_positives)
    drawn = rows[place]
    while (same := drawn == rows[place]).any():  # a class has two rows at least, so this ends soon
        at = place[same]
        drawn[same] = store.label_rows[rng.integers(begin[at], end[at])]
    positive = np.unique(np.stack([place, store.query_ids[drawn]]), axis=1)
    place = np.repeat(np.arange(len(rows)), num_negatives)
    others = rng.integers(0, (store.num_rows - (end - begin))[place]) if len(place) else place
    others = np.where(others >= begin[place], others + (end - begin)[place], others)  # pass over the own class
    negative = np.unique(np.stack([place, store.query_ids[store.label_rows[others]]]), axis=1)
    return positive, negative


def _known_positives(store: PairStore, query_ids: np.ndarray) -> np.ndarray:
    """[2, n] (place in `query_ids`, text id): the positives of all the source's rows with these queries."""
    begin, end = (
        np.searchsorted(store.query_ids, query_ids, side=side, sorter=store.query_order) for side in ("left", "right")
    )
    place, order = ranges(begin, end)
    row, text = _rows_values(store.positive_ids, store.positive_offsets, store.query_order[order])
    return np.stack([place[row], text])


def _related(known: np.ndarray, document_ids: np.ndarray) -> np.ndarray:
    """[2, n] (query, document): the pairs (query, text id) of `known` whose text is a document of the batch; sorted."""
    document = np.searchsorted(document_ids, known[1])
    there = document < len(document_ids)
    there[there] = document_ids[document[there]] == known[1, there]
    return np.stack([known[0, there], document[there]])


def _alike(known: np.ndarray, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """`PairBatch.alike` and `hubs` of the distinct, sorted pairs (query, text id)."""
    _, text, counts = np.unique(known[1], return_inverse=True, return_counts=True)
    is_hub = counts[text] > HUB_QUERIES
    hub_query, hub_text = known[:, is_hub]
    column = np.arange(len(hub_query)) - np.searchsorted(hub_query, hub_query)
    hubs = np.full((num_queries, column.max(initial=-1) + 1), -1, np.int64)
    hubs[hub_query, column] = hub_text
    query, text = known[0, ~is_hub], text[~is_hub]
    by_text = np.stack([text, query])[:, np.lexsort((query, text))]
    place, other = pairs_of(by_text, text)
    itself = np.arange(num_queries)
    pairs = np.concatenate([np.stack([query[place], other]), np.stack([itself, itself])], axis=1)
    return np.unique(pairs, axis=1), hubs


def pairs_of(pairs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[2, n] (place in `wanted`, second) of all `pairs`, sorted by their first, whose first is in `wanted`."""
    begin, end = (np.searchsorted(pairs[0], wanted, side=side) for side in ("left", "right"))
    place, index = ranges(begin, end)
    return np.stack([place, pairs[1, index]])


def _contains(pairs: np.ndarray, wanted: np.ndarray, num_documents: int) -> np.ndarray:
    """[n] bool: which of `wanted` [2, n] are among the sorted `pairs`."""
    return np.isin(wanted[0] * num_documents + wanted[1], pairs[0] * num_documents + pairs[1])


def _labels(
    store: PairStore, rows: np.ndarray, row_query: np.ndarray, query_ids: np.ndarray, document_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Classes of queries and documents; nothing for other tasks than classification."""
    if store.labels is None:
        return {}
    query_labels = np.empty(len(query_ids), np.int64)
    query_labels[row_query] = store.labels[rows]
    # every text is one row, and rows are in the order of text ids
    document_rows = np.searchsorted(store.query_ids, document_ids)
    return {"query_labels": query_labels, "document_labels": np.asarray(store.labels[document_rows], np.int64)}
