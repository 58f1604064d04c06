"""Which texts of a global batch are positives, negatives, or neither, for the rows whose loss a rank computes.

Legend: q this rank's rows, p their positives, m their hard negatives; a distinct queries and d distinct documents of the
whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_conan.data.pair_batch import PairBatch, pairs_of
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
    queries: Exclusions | None
    """[q] rows against [a] queries: itself, those that share a known positive, the row's class."""
    positives: Exclusions | None
    """[p] positives against [a] queries: those that the positive belongs to, its class."""


def own_rows(batch: PairBatch, dp_rank: int, dp_size: int) -> tuple[int, int]:
    """First and last + 1 of the rows whose loss a rank computes; shares differ by one row at most."""
    num_rows = len(batch.rows)
    return num_rows * dp_rank // dp_size, num_rows * (dp_rank + 1) // dp_size


def row_relations(
    batch: PairBatch,
    begin: int,
    end: int,
    device: torch.device,
    *,
    with_queries: bool = True,
    with_positives: bool = True,
) -> RowRelations:
    """Relations of the rows begin .. end - 1 of a global batch; `queries` and `positives` only where they are needed."""
    row_query = batch.row_query[begin:end]
    positive, negative = (_between(pairs, begin, end) for pairs in (batch.positive, batch.negative))
    query_labels, document_labels = batch.query_labels, batch.document_labels
    if query_labels is None or document_labels is None:  # no classes, no keys
        query_labels = np.empty((len(batch.query_ids), 0), np.int64)
        document_labels = np.empty((len(batch.document_ids), 0), np.int64)
    else:
        query_labels, document_labels = query_labels[:, None], document_labels[:, None]

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def exclusions(anchor_keys: np.ndarray, candidate_keys: np.ndarray, pairs: np.ndarray) -> Exclusions:
        return Exclusions(tensor(anchor_keys), tensor(candidate_keys), tensor(pairs))

    documents = exclusions(query_labels[row_query], document_labels, pairs_of(batch.related, row_query))
    num_hubs = batch.hubs.shape[1]
    queries = positives = None
    if with_queries:  # a common hub at any of the places
        anchor_hubs, candidate_hubs = np.repeat(batch.hubs, num_hubs, axis=1), np.tile(batch.hubs, num_hubs)
        queries = exclusions(
            np.hstack([query_labels, anchor_hubs])[row_query],
            np.hstack([query_labels, candidate_hubs]),
            pairs_of(batch.alike, row_query),
        )
    if with_positives:
        is_hub = np.isin(batch.document_ids, batch.hubs)
        hub_ids = np.where(is_hub, batch.document_ids, -1)[:, None].repeat(num_hubs, axis=1)
        listed = batch.related[:, ~is_hub[batch.related[1]]]
        by_document = listed[::-1][:, np.lexsort(listed)]  # (document, query), sorted
        positives = exclusions(
            np.hstack([document_labels, hub_ids])[positive[1]],
            np.hstack([query_labels, batch.hubs]),
            pairs_of(by_document, positive[1]),
        )
    return RowRelations(
        num_rows=end - begin,
        row_query=tensor(row_query),
        positive_row=tensor(positive[0]),
        positive_document=tensor(positive[1]),
        first_positive=tensor(positive[1][np.searchsorted(positive[0], np.arange(end - begin))]),
        negative_row=tensor(negative[0]),
        negative_document=tensor(negative[1]),
        documents=documents,
        queries=queries,
        positives=positives,
    )


def _between(pairs: np.ndarray, begin: int, end: int) -> np.ndarray:
    """[2, n] the (row, document) pairs of rows begin .. end - 1, with rows counted from begin."""
    first, last = np.searchsorted(pairs[0], (begin, end))
    return np.stack([pairs[0, first:last] - begin, pairs[1, first:last]])
