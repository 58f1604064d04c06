"""Which texts of a global batch are positives, negatives, or neither, for the rows whose loss a rank computes.

Legend: q this rank's rows, p their positives, m their hard negatives; a distinct queries and d distinct documents of the
whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_conan.data.pair_batch import PairBatch
from megatron_conan.loss.blockwise import Exclusions


@dataclass(frozen=True)
class RowRelations:
    """Index tensors of this rank's rows, on its device."""

    num_rows: int
    row_query: Tensor
    """[q] query of each row."""
    positive_row: Tensor
    """[p] row of each positive, rising."""
    positive_document: Tensor
    """[p]."""
    first_positive: Tensor
    """[q] document, the first positive of each row."""
    negative_row: Tensor
    """[m] row of each hard negative."""
    negative_document: Tensor
    """[m]."""
    documents: Exclusions
    """[q] rows against [d] documents: known positives, the query's own text, the row's class."""
    queries: Exclusions
    """[q] rows against [a] queries: itself, those that share a positive, the row's class."""
    positives: Exclusions
    """[p] positives against [a] queries: those that the positive belongs to, its class."""


def own_rows(batch: PairBatch, dp_rank: int, dp_size: int) -> tuple[int, int]:
    """First and last + 1 of the rows whose loss a rank computes; shares differ by one row at most."""
    num_rows = len(batch.rows)
    return num_rows * dp_rank // dp_size, num_rows * (dp_rank + 1) // dp_size


def row_relations(batch: PairBatch, begin: int, end: int, device: torch.device) -> RowRelations:
    """Relations of the rows begin .. end - 1 of a global batch."""
    row_query = batch.row_query[begin:end]
    positive, negative = (_between(pairs, begin, end) for pairs in (batch.positive, batch.negative))
    by_document = batch.related[::-1][:, np.lexsort((batch.related[0], batch.related[1]))]  # (document, query), sorted
    documents = _pairs_of(batch.related, row_query)
    shared = _pairs_of(by_document, documents[1])  # (place in documents, query that shares it)
    queries = np.concatenate(
        [np.stack([documents[0][shared[0]], shared[1]]), [np.arange(end - begin), row_query]], axis=1
    )
    own = np.stack([np.arange(positive.shape[1]), row_query[positive[0]]])
    positives = np.concatenate([_pairs_of(by_document, positive[1]), own], axis=1)
    query_labels, document_labels = batch.query_labels, batch.document_labels
    if query_labels is None or document_labels is None:  # no classes, no keys
        query_labels = np.empty((len(batch.query_ids), 0), np.int64)
        document_labels = np.empty((len(batch.document_ids), 0), np.int64)
    else:
        query_labels, document_labels = query_labels[:, None], document_labels[:, None]

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def exclusions(anchors: np.ndarray, candidates: np.ndarray, pairs: np.ndarray) -> Exclusions:
        return Exclusions(tensor(anchors), tensor(candidates), tensor(pairs))

    row_labels = query_labels[row_query]
    return RowRelations(
        num_rows=end - begin,
        row_query=tensor(row_query),
        positive_row=tensor(positive[0]),
        positive_document=tensor(positive[1]),
        first_positive=tensor(positive[1][np.searchsorted(positive[0], np.arange(end - begin))]),
        negative_row=tensor(negative[0]),
        negative_document=tensor(negative[1]),
        documents=exclusions(row_labels, document_labels, documents),
        queries=exclusions(row_labels, query_labels, queries),
        positives=exclusions(document_labels[positive[1]], query_labels, positives),
    )


def _between(pairs: np.ndarray, begin: int, end: int) -> np.ndarray:
    """[2, n] the (row, document) pairs of rows begin .. end - 1, with rows counted from begin."""
    first, last = np.searchsorted(pairs[0], (begin, end))
    return np.stack([pairs[0, first:last] - begin, pairs[1, first:last]])


def _pairs_of(pairs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[2, n] (place in `wanted`, second) of all sorted `pairs` whose first is in `wanted`."""
    starts, ends = (np.searchsorted(pairs[0], wanted, side=side) for side in ("left", "right"))
    place = np.repeat(np.arange(len(wanted)), ends - starts)
    within = np.arange(len(place)) - np.repeat(np.cumsum(ends - starts) - (ends - starts), ends - starts)
    return np.stack([place, pairs[1, starts[place] + within]])
