"""Global batches: each text once, each row's own texts, choices that the generator alone settles; against plain loops."""

from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_stores import ROWS, random_stores, write_store

from megatron_conan.data import pair_batch
from megatron_conan.data.pair_batch import PairBatch, build_pair_batch
from megatron_conan.data.pairs import PairStore

SEED = st.integers(0, 2**32)
COUNT = st.integers(0, 6)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tokenizer) -> dict[str, list[PairStore]]:
    """Some random stores of every task."""
    folder = tmp_path_factory.mktemp("stores")
    return {task: random_stores(folder, tokenizer, task, 12) for task in ("retrieval", "sts", "classification")}


def build(store: PairStore, rows: Iterable[int], seed: int, **settings: Any) -> PairBatch:
    numbers = np.array([row % store.num_rows for row in rows])
    return build_pair_batch(store, numbers, np.random.default_rng(seed), **settings)


def of_row(batch: PairBatch, pairs: np.ndarray, i: int) -> list[int]:
    """Text ids of row i's positives or negatives, in their order."""
    return batch.document_ids[pairs[1, pairs[0] == i]].tolist()


def known_positives(batch: PairBatch, query: int) -> set[int]:
    """What any row of the source names a positive of this text, in the batch or not, and the text itself."""
    rows = np.flatnonzero(batch.store.query_ids == query).tolist()
    return {query} | {int(text) for row in rows for text in batch.store.positives(row)}


def check_layout(batch: PairBatch) -> None:
    """What holds for every batch of every task."""
    store = batch.store
    assert batch.query_ids.tolist() == sorted({store.query(row) for row in batch.rows.tolist()})
    assert batch.query_ids[batch.row_query].tolist() == [store.query(row) for row in batch.rows.tolist()]
    assert np.all(np.diff(batch.document_ids) > 0)  # each text once
    assert sorted(set(batch.positive[0].tolist())) == list(range(len(batch.rows)))
    for pairs in (batch.positive, batch.negative):
        assert np.all(np.diff(pairs[0]) >= 0)
        assert pairs.dtype == np.int64
        assert len(set(zip(*pairs.tolist(), strict=True))) == pairs.shape[1]
    assert len(batch.slots) == batch.negative.shape[1]
    expected = [
        (a, d)
        for a, query in enumerate(batch.query_ids.tolist())
        for d, document in enumerate(batch.document_ids.tolist())
        if document in known_positives(batch, query)
    ]
    assert [tuple(pair) for pair in batch.related.T.tolist()] == expected
    check_queries(batch)
    texts = [batch.text(i) for i in range(batch.num_texts)]
    expected_texts = [("query", i) for i in batch.query_ids.tolist()]
    assert texts == expected_texts + [("document", i) for i in batch.document_ids.tolist()]
    assert (batch.task, batch.scores.dtype) == (store.task, np.float32)


def check_queries(batch: PairBatch) -> None:
    """Queries that share a known text: listed, or, where more than HUB_QUERIES share it, by the text's id."""
    known = [known_positives(batch, query) for query in batch.query_ids.tolist()]
    shared_by = Counter(text for texts in known for text in texts)
    hubs = {text for text, count in shared_by.items() if count > pair_batch.HUB_QUERIES}
    numbers = range(len(known))
    alike = [(a, b) for a in numbers for b in numbers if a == b or known[a] & known[b] - hubs]
    assert [tuple(pair) for pair in batch.alike.T.tolist()] == alike
    width = max(len(texts & hubs) for texts in known)
    assert batch.hubs.shape == (len(known), width)
    for texts, row in zip(known, batch.hubs.tolist(), strict=True):
        assert sorted(row, key=lambda text: (text < 0, text)) == row  # -1 behind the last
        assert [text for text in row if text >= 0] == sorted(texts & hubs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(task=st.sampled_from(["retrieval", "sts"]), store=st.integers(0, 11), rows=ROWS, limit=st.integers(0, 4))
def test_texts_of_many_queries_are_hubs(stores, task, store, rows, limit):
    with mock.patch.object(pair_batch, "HUB_QUERIES", limit):
        check_layout(build(stores[task][store], rows, 0, num_positives=2, num_negatives=2))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(store=st.integers(0, 11), rows=ROWS, seed=SEED, num_positives=st.integers(1, 5), num_negatives=COUNT)
def test_rows_bring_their_own_texts_and_no_more_than_asked(stores, store, rows, seed, num_positives, num_negatives):
    batch = build(stores["retrieval"][store], rows, seed, num_positives=num_positives, num_negatives=num_negatives)
    check_layout(batch)
    for i, row in enumerate(batch.rows.tolist()):
        all_positives, all_negatives = batch.store.positives(row).tolist(), batch.store.negatives(row).tolist()
        positives, negatives = of_row(batch, batch.positive, i), of_row(batch, batch.negative, i)
        assert len(positives) == min(num_positives, len(all_positives))
        assert positives == [text for text in all_positives if text in positives]  # in the file's order
        assert negatives == [text for text in all_negatives if text in negatives]
        known = known_positives(batch, batch.store.query(row))
        assert not known & set(negatives)
        # at most as many as asked; fewer only if there are no more, or if a drawn one is a positive after all
        num_known = len(known & set(all_negatives))
        drawn = min(num_negatives, len(all_negatives))
        assert max(drawn - num_known, 0) <= len(negatives) <= min(drawn, len(all_negatives) - num_known)
    rows_of_batch = batch.rows.tolist()
    every = {t for row in rows_of_batch for t in (*batch.store.positives(row), *batch.store.negatives(row))}
    assert set(batch.document_ids.tolist()) <= every
    assert (batch.slots == -1).all()
    assert np.isnan(batch.scores).all()
    assert batch.query_labels is None
    assert batch.document_labels is None


@settings(max_examples=80, deadline=None, derandomize=True)
@given(store=st.integers(0, 11), rows=ROWS, seed=SEED)
def test_without_a_limit_all_come(stores, store, rows, seed):
    """Nothing is left to chance: every pair, in order; what is no negative of a query stays as a document for the others."""
    batch = build(stores["retrieval"][store], rows, seed, num_positives=99, num_negatives=99)
    check_layout(batch)
    positives, negatives, documents = [], [], set()
    for i, row in enumerate(batch.rows.tolist()):
        known = known_positives(batch, batch.store.query(row))
        positives += [(i, text) for text in batch.store.positives(row).tolist()]
        negatives += [(i, text) for text in batch.store.negatives(row).tolist() if text not in known]
        documents |= {*batch.store.positives(row).tolist(), *batch.store.negatives(row).tolist()}
    for pairs, expected in ((batch.positive, positives), (batch.negative, negatives)):
        found = zip(pairs[0].tolist(), batch.document_ids[pairs[1]].tolist(), strict=True)
        assert list(found) == expected
    assert batch.document_ids.tolist() == sorted(documents)


def test_random_stores_have_what_makes_batches_hard(stores):
    """What the tests above rest on: shared queries and positives, dropped negatives, documents that are queries."""
    seen = {"shared query": 0, "shared positive": 0, "dropped negative": 0, "own text": 0}
    for store in stores["retrieval"]:
        batch = build(store, range(store.num_rows), 0, num_positives=99, num_negatives=99)
        positives = [text for row in range(store.num_rows) for text in store.positives(row)]
        seen["shared query"] += len(batch.query_ids) < len(batch.rows)
        seen["shared positive"] += len(set(positives)) < len(positives)
        seen["dropped negative"] += batch.negative.shape[1] < len(store.negative_ids)
        seen["own text"] += bool(set(batch.query_ids.tolist()) & set(batch.document_ids.tolist()))
    assert min(seen.values()) > 5, seen


@settings(max_examples=100, deadline=None, derandomize=True)
@given(store=st.integers(0, 11), rows=ROWS, seed=SEED, width=st.integers(0, 4), data=st.data())
def test_mined_negatives_take_the_place_of_the_files(stores, store, rows, seed, width, data):
    store = stores["retrieval"][store]
    cells = st.lists(
        st.integers(-1, store.num_texts - 1),
        min_size=width,
        max_size=width,
        unique_by=lambda x: x if x >= 0 else object(),
    )
    table = np.array([data.draw(cells) for _ in rows], dtype=np.int64).reshape(len(rows), width)
    batch = build(store, rows, seed, num_positives=2, num_negatives=3, mined=table)
    check_layout(batch)
    expected = [
        (i, int(text), slot)
        for i, row in enumerate(batch.rows.tolist())
        for slot, text in enumerate(table[i])
        if text >= 0 and text not in known_positives(batch, store.query(row))
    ]
    found = zip(batch.negative[0], batch.document_ids[batch.negative[1]], batch.slots, strict=True)
    assert list(found) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(store=st.integers(0, 11), rows=ROWS, seed=SEED, num_positives=st.integers(1, 4), num_negatives=COUNT)
def test_classes_give_positives_and_negatives(stores, store, rows, seed, num_positives, num_negatives):
    store = stores["classification"][store]
    batch = build(store, rows, seed, num_positives=num_positives, num_negatives=num_negatives)
    check_layout(batch)
    label = {store.query(row): int(store.labels[row]) for row in range(store.num_rows)}
    for i, row in enumerate(batch.rows.tolist()):
        own = store.query(row)
        positives, negatives = of_row(batch, batch.positive, i), of_row(batch, batch.negative, i)
        assert 1 <= len(positives) <= num_positives
        assert len(negatives) <= num_negatives
        assert bool(negatives) == bool(num_negatives)
        assert own not in positives
        assert {label[text] for text in positives} == {label[own]}
        assert label[own] not in {label[text] for text in negatives}
    assert batch.query_labels.tolist() == [label[text] for text in batch.query_ids.tolist()]
    assert batch.document_labels.tolist() == [label[text] for text in batch.document_ids.tolist()]
    assert batch.query_labels.dtype == batch.document_labels.dtype == np.int64
    used = {*batch.positive[1].tolist(), *batch.negative[1].tolist()}
    assert used == set(range(len(batch.document_ids)))
    assert (batch.slots == -1).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(store=st.integers(0, 11), rows=ROWS, seed=SEED, num_negatives=COUNT)
def test_scored_pairs_keep_their_scores(stores, store, rows, seed, num_negatives):
    batch = build(stores["sts"][store], rows, seed, num_positives=3, num_negatives=num_negatives)
    check_layout(batch)
    numbers = batch.rows.tolist()
    assert batch.scores.tolist() == [batch.store.score(row) for row in numbers]
    assert batch.positive[0].tolist() == list(range(len(numbers)))
    second = batch.document_ids[batch.positive[1]]
    assert second.tolist() == [batch.store.positives(row)[0] for row in numbers]
    assert batch.negative.shape == (2, 0)


def arrays(batch: PairBatch) -> list[list[Any]]:
    names = ("rows", "query_ids", "document_ids", "row_query", "positive", "negative", "slots", "related")
    return [getattr(batch, name).tolist() for name in names]


@pytest.mark.parametrize("task", ["retrieval", "classification"])
def test_the_generators_state_settles_every_choice(stores, task):
    store = stores[task][0]
    wanted = {"num_positives": 1, "num_negatives": 2}
    one, again, other = (build(store, range(store.num_rows), seed, **wanted) for seed in (5, 5, 6))
    assert arrays(one) == arrays(again)
    assert arrays(one) != arrays(other)
    generator = np.random.default_rng(5)
    first, second = (build_pair_batch(store, one.rows, generator, **wanted) for _ in range(2))
    assert arrays(first) == arrays(one)
    assert arrays(second) != arrays(one)


def chi_square(counts: Iterable[int], num_cells: int) -> float:
    counts = [*counts]
    counts += [0] * (num_cells - len(counts))
    mean = sum(counts) / num_cells
    return sum((count - mean) ** 2 for count in counts) / mean


@pytest.fixture(scope="module")
def fair(tmp_path_factory, tokenizer) -> dict[str, PairStore]:
    """Few texts, so that each choice is made often: 5 positives and 5 negatives; classes of 6, 4 and 3 texts."""
    folder = tmp_path_factory.mktemp("fair")
    row = {"query": "q", "pos": [f"p{i}" for i in range(5)], "neg": [f"n{i}" for i in range(5)]}
    other = {"query": "r", "pos": ["one"], "neg": []}
    texts = [{"text": f"{c} {i}", "label": c} for c, size in (("a", 6), ("b", 4), ("c", 3)) for i in range(size)]
    return {
        "retrieval": write_store(folder, "retrieval", tokenizer, "retrieval", [other, row, other]),
        "classification": write_store(folder, "classification", tokenizer, "classification", texts),
    }


def test_every_choice_of_a_row_is_as_likely(fair):
    """2 of 5, 4000 times: 10 pairs. A chi-square of 9 degrees of freedom exceeds 27.9 once in 1000 seeds."""
    batch = build(fair["retrieval"], [1, 0] * 4000, 0, num_positives=2, num_negatives=2)
    for pairs in (batch.positive, batch.negative):
        chosen = [tuple(sorted(of)) for of in pairs[1, pairs[0] % 2 == 0].reshape(-1, 2).tolist()]
        assert len(chosen) == 4000
        counts = [chosen.count(pair) for pair in combinations(sorted(set(pairs[1, pairs[0] % 2 == 0].tolist())), 2)]
        assert len(counts) == 10
        assert chi_square(counts, 10) < 27.9
    assert (of_row(batch, batch.positive, 1), of_row(batch, batch.negative, 1)) == (
        [fair["retrieval"].positives(0)[0]],
        [],
    )


def test_classes_are_drawn_from_evenly(fair):
    """Positives: the 5 others of a class of 6; negatives: all 7 texts of other classes alike. 4000 draws each.

    Chi-squares of 4 and 6 degrees of freedom exceed 18.5 and 22.5 once in 1000 seeds.
    """
    store = fair["classification"]
    batch = build(store, [2] * 4000, 0, num_positives=1, num_negatives=1)
    own = store.query(2)
    for pairs, wanted, bound in (
        (batch.positive, {store.query(row) for row in store.rows_of_label(0)} - {own}, 18.5),
        (batch.negative, {store.query(row) for row in (*store.rows_of_label(1), *store.rows_of_label(2))}, 22.5),
    ):
        texts, counts = np.unique(batch.document_ids[pairs[1]], return_counts=True)
        assert set(texts.tolist()) == wanted
        assert counts.sum() == 4000
        assert chi_square(counts.tolist(), len(wanted)) < bound


def test_the_middle_class_passes_over_itself(fair):
    """Texts before and behind a class are negatives of it."""
    store = fair["classification"]
    batch = build(store, store.rows_of_label(1).tolist() * 50, 1, num_positives=1, num_negatives=2)
    others = {store.query(row) for row in (*store.rows_of_label(0), *store.rows_of_label(2))}
    assert set(batch.document_ids[batch.negative[1]].tolist()) == others


def test_a_negative_that_another_row_knows_as_positive_is_dropped(tmp_path, tokenizer):
    rows = [
        {"query": "q", "pos": ["a"], "neg": ["b", "c", "d"]},
        {"query": "q", "pos": ["b", "e"], "neg": ["a", "d"]},
        {"query": "r", "pos": ["f"], "neg": ["b", "q"]},
        {"query": "s", "pos": ["g"], "neg": ["s", "a"]},
    ]
    store = write_store(tmp_path, "pairs", tokenizer, "retrieval", rows)

    def negatives(batch: PairBatch) -> list[list[str]]:
        return [[store.text(text) for text in of_row(batch, batch.negative, i)] for i in range(len(batch.rows))]

    together = build(store, range(4), 0, num_positives=9, num_negatives=9)
    assert negatives(together) == [["c", "d"], ["d"], ["b", "q"], ["a"]]
    alone = build(store, [0], 0, num_positives=9, num_negatives=9)
    assert negatives(alone) == [["c", "d"]]  # the row that says so isn't in the batch
    mined = np.array([[store.positives(1)[0], -1, store.query(0), store.positives(3)[0]]] * 2)
    batch = build(store, [0, 1], 0, mined=mined)
    assert negatives(batch) == [["g"], ["g"]]
    assert batch.slots.tolist() == [3, 3]
    # known as a positive, though the row that says so brought another one along
    for seed in range(10):
        batch = build(store, range(4), seed, num_positives=1, num_negatives=9)
        assert negatives(batch)[0] == ["c", "d"]


def test_what_is_no_batch_of_pairs_is_refused(stores, tmp_path, tokenizer):
    rows = [{"instruction": "say", "output": "word"}]
    sft = write_store(tmp_path, "sft", tokenizer, "sft", rows)
    with pytest.raises(ValueError, match="holds sft rows, which are no pairs; use it in the sft stage"):
        build(sft, [0], 0)
    for shape in ((3, 4), (1, 4), (0, 4)):
        with pytest.raises(ValueError, match=rf"mined negatives have shape \({shape[0]}, 4\); expected \[2, K\]"):
            build(stores["retrieval"][0], [0, 1], 0, mined=np.zeros(shape, np.int64))
