"""What is a negative of what, over all pairs by hand: known positives, a query's own text, and its class never are."""

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_stores import ROWS, random_stores, write_store
from torch import Tensor

from megatron_conan.data import pair_batch
from megatron_conan.data.pair_batch import PairBatch, build_pair_batch
from megatron_conan.data.pairs import PairStore
from megatron_conan.loss.blockwise import Exclusions
from megatron_conan.train.relations import RowRelations, own_rows, row_relations

CPU = torch.device("cpu")
TASKS = ["retrieval", "classification"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tokenizer) -> dict[str, list[PairStore]]:
    folder = tmp_path_factory.mktemp("stores")
    return {task: random_stores(folder, tokenizer, task, 8) for task in TASKS}


def dense(excluded: Exclusions) -> Tensor:
    """[anchors, candidates] bool."""
    agrees = excluded.anchor_keys[:, None, :] == excluded.candidate_keys[None, :, :]
    result = (agrees & (excluded.anchor_keys[:, None, :] >= 0)).any(dim=2)
    anchor, candidate = excluded.pairs
    result[anchor, candidate] = True
    return result


def draw_batch(store: PairStore, rows: list[int], seed: int, num_positives: int, num_negatives: int) -> PairBatch:
    return build_pair_batch(
        store,
        np.array([row % store.num_rows for row in rows]),
        np.random.default_rng(seed),
        num_positives=num_positives,
        num_negatives=num_negatives,
    )


@dataclass
class ByHand:
    """The same as `row_relations` for all rows of a batch, from text ids and the store alone."""

    batch: PairBatch

    def known(self, query: int, document: int) -> bool:
        """The document is the query's own text, or some row of the source names it a positive of the query."""
        return document in self.known_texts(query)

    def known_texts(self, query: int) -> set[int]:
        store = self.batch.store
        rows = [row for row in range(store.num_rows) if store.query(row) == query]
        return {query}.union(*(store.positives(row).tolist() for row in rows))

    def same_class(self, one: int, other: int) -> bool:
        store = self.batch.store
        if store.labels is None:
            return False
        label = {store.query(row): int(store.labels[row]) for row in range(store.num_rows)}
        return label[one] == label[other]

    def excluded(self) -> dict[str, list[list[bool]]]:
        """Anchor by anchor, candidate by candidate."""
        batch = self.batch
        queries, documents = batch.query_ids.tolist(), batch.document_ids.tolist()
        rows = [batch.store.query(row) for row in batch.rows.tolist()]
        positives = [(rows[i], documents[d]) for i, d in batch.positive.T.tolist()]

        def share(one: int, other: int) -> bool:
            return bool(self.known_texts(one) & self.known_texts(other))

        return {
            "documents": [[self.known(q, d) or self.same_class(q, d) for d in documents] for q in rows],
            "queries": [[share(q, other) or self.same_class(q, other) for other in queries] for q in rows],
            "positives": [
                [other == q or self.known(other, d) or self.same_class(d, other) for other in queries]
                for q, d in positives
            ],
        }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    task=st.sampled_from(TASKS),
    store=st.integers(0, 7),
    rows=ROWS,
    seed=st.integers(0, 1000),
    num_positives=st.integers(1, 4),
    num_negatives=st.integers(0, 4),
    hub_queries=st.sampled_from([1, 2, 4, 32]),
)
def test_exclusions_are_those_by_hand(stores, task, store, rows, seed, num_positives, num_negatives, hub_queries):
    """Whatever makes a hub."""
    with mock.patch.object(pair_batch, "HUB_QUERIES", hub_queries):
        batch = draw_batch(stores[task][store], rows, seed, num_positives, num_negatives)
    found = row_relations(batch, 0, len(batch.rows), CPU)
    for name, expected in ByHand(batch).excluded().items():
        assert dense(getattr(found, name)).tolist() == expected, name


def check_rows(batch: PairBatch, part: RowRelations, begin: int, end: int) -> None:
    """Rows counted from `begin`, with their texts."""
    rows = range(begin, end)
    assert part.num_rows == end - begin
    assert part.row_query.tolist() == [int(batch.row_query[row]) for row in rows]
    for pairs, row, document in (
        (batch.positive, part.positive_row, part.positive_document),
        (batch.negative, part.negative_row, part.negative_document),
    ):
        expected = [(int(i) - begin, int(d)) for i, d in pairs.T if begin <= i < end]
        assert list(zip(row.tolist(), document.tolist(), strict=True)) == expected
    first = [next(int(d) for i, d in batch.positive.T if i == row) for row in rows]
    assert part.first_positive.tolist() == first


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    task=st.sampled_from(TASKS),
    store=st.integers(0, 7),
    rows=ROWS,
    num_negatives=st.integers(0, 4),
    dp_size=st.integers(1, 5),
)
def test_the_ranks_parts_make_the_whole(stores, task, store, rows, num_negatives, dp_size):
    """Also where there are fewer rows than ranks."""
    batch = draw_batch(stores[task][store], rows, 0, 2, num_negatives)
    whole = row_relations(batch, 0, len(batch.rows), CPU)
    bounds = [own_rows(batch, dp_rank, dp_size) for dp_rank in range(dp_size)]
    assert [begin for begin, _ in bounds] + [len(batch.rows)] == [0] + [end for _, end in bounds]
    sizes = [end - begin for begin, end in bounds]
    assert max(sizes) - min(sizes) <= 1
    parts = [row_relations(batch, begin, end, CPU) for begin, end in bounds]
    for part, (begin, end) in zip(parts, bounds, strict=True):
        check_rows(batch, part, begin, end)
    for name in ("documents", "queries", "positives"):
        joined = torch.cat([dense(getattr(part, name)) for part in parts])
        assert torch.equal(joined, dense(getattr(whole, name))), name


def test_all_kinds_of_exclusions_occur(stores):
    """What the tests above rest on, and that something is left."""
    for task in TASKS:
        kinds = dict.fromkeys(("document", "query", "positive"), 0)
        for store in stores[task]:
            batch = draw_batch(store, list(range(12)), 0, 2, 2)
            found = row_relations(batch, 0, 12, CPU)
            documents, queries, positives = (dense(x) for x in (found.documents, found.queries, found.positives))
            own = torch.zeros_like(documents).index_put_(
                (found.positive_row, found.positive_document), torch.tensor(True)
            )
            kinds["document"] += bool((documents & ~own).any())
            kinds["query"] += bool((queries.sum(1) > 1).any())
            kinds["positive"] += bool((positives.sum(1) > 1).any())
            assert all(not matrix.all() for matrix in (documents, queries, positives))
        assert min(kinds.values()) > 3, kinds


def test_a_batch_by_hand(tmp_path, tokenizer):
    """q and r share b; s is a document of r and a query of its own."""
    rows = [
        {"query": "q", "pos": ["a", "b"], "neg": ["n"]},
        {"query": "r", "pos": ["b", "s"]},
        {"query": "s", "pos": ["c"]},
        {"query": "q", "pos": ["d"]},
    ]
    store = write_store(tmp_path, "pairs", tokenizer, "retrieval", rows)
    batch = draw_batch(store, [0, 1, 2, 3], 0, 9, 9)
    queries, documents = ([store.text(i) for i in ids] for ids in (batch.query_ids, batch.document_ids))
    found = row_relations(batch, 0, 4, CPU)

    def names(excluded: Exclusions, texts: list[str]) -> list[set[str]]:
        return [{text for text, out in zip(texts, row, strict=True) if out} for row in dense(excluded).tolist()]

    assert names(found.documents, documents) == [{"a", "b", "d"}, {"b", "s"}, {"c", "s"}, {"a", "b", "d"}]
    assert names(found.queries, queries) == [{"q", "r"}, {"q", "r", "s"}, {"r", "s"}, {"q", "r"}]
    positives = [(int(i), documents[d]) for i, d in zip(found.positive_row, found.positive_document, strict=True)]
    assert positives == [(0, "a"), (0, "b"), (1, "b"), (1, "s"), (2, "c"), (3, "d")]
    assert names(found.positives, queries) == [{"q"}, {"q", "r"}, {"q", "r"}, {"r", "s"}, {"s"}, {"q"}]
    # what rows outside of the batch say counts, too: q and r share b, which isn't there
    batch = draw_batch(store, [3, 2], 0, 1, 0)
    assert names(row_relations(batch, 0, 2, CPU).queries, ["q", "s"]) == [{"q"}, {"s"}]
    two = [{"query": "q", "pos": ["a"]}, {"query": "r", "pos": ["c"]}, {"query": "q", "pos": ["b"]}]
    store = write_store(tmp_path, "two", tokenizer, "retrieval", [*two, {"query": "r", "pos": ["b"]}])
    batch = draw_batch(store, [0, 1], 0, 9, 9)
    assert [store.text(i) for i in batch.document_ids] == ["a", "c"]
    found = row_relations(batch, 0, 2, CPU)
    assert names(found.queries, ["q", "r"]) == [{"q", "r"}] * 2
    assert names(found.positives, ["q", "r"]) == [{"q"}, {"r"}]


def test_only_what_is_asked_for_is_made(stores):
    batch = draw_batch(stores["retrieval"][0], [0, 1, 2], 0, 1, 1)
    found = row_relations(batch, 0, 3, CPU, with_queries=False, with_positives=False)
    assert (found.queries, found.positives) == (None, None)
    whole = row_relations(batch, 0, 3, CPU)
    assert torch.equal(dense(found.documents), dense(whole.documents))
