"""Sources of rows and their pools: against plain loops, with hub queries, repeated rows, siblings, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from gloo_pool import WorkerPool
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_contexts import context_of

from megatron_conan.data.ragged import Ragged, ranges
from megatron_conan.mining.encode import EmbeddedTexts
from megatron_conan.mining.pools import MiningSource, Pools, mine_pools
from megatron_conan.mining.select import SelectionSettings

lists = st.lists(st.lists(st.integers(0, 30), max_size=5).map(lambda x: np.array(x, np.int64)), max_size=8)


@given(lists, st.data())
def test_ragged_is_a_list_of_lists(parts: list[np.ndarray], data: st.DataObject) -> None:
    ragged = Ragged.of(parts)
    assert len(ragged) == len(parts)
    assert ragged.counts.tolist() == [len(part) for part in parts]
    assert ragged.owner.tolist() == [i for i, part in enumerate(parts) for _ in part]
    which = data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=9)) if parts else []
    taken = ragged.take(np.array(which, np.int64))
    assert [taken.values[a:b].tolist() for a, b in zip(taken.offsets[:-1], taken.offsets[1:], strict=True)] == [
        parts[i].tolist() for i in which
    ]
    cut = ragged.take(slice(1, 3))
    assert cut.values.tolist() == [value for part in parts[1:3] for value in part]


def test_ranges_are_counted_out() -> None:
    which, numbers = ranges(np.array([3, 7, 1]), np.array([5, 7, 4]))
    assert which.tolist() == [0, 0, 2, 2, 2]
    assert numbers.tolist() == [3, 4, 1, 2, 3]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(7, 20), min_size=1, max_size=4)), min_size=1))
def test_rows_of_a_query_share_its_positives(rows: list[tuple[int, list[int]]]) -> None:
    row_query = np.array([query for query, _ in rows], np.int64)
    positives = Ragged.of([np.array(found, np.int64) for _, found in rows])
    expected = {query: sorted({p for q, found in rows if q == query for p in found}) for query, _ in rows}
    for order in (None, np.argsort(row_query, kind="stable")):
        source = MiningSource.of_rows("rows", row_query, positives, np.arange(7, 21), str, order)
        assert source.query_ids.tolist() == sorted(expected)
        assert source.query_ids[source.query_of_row].tolist() == row_query.tolist()
        for place, query in enumerate(source.query_ids.tolist()):
            assert source.positives.take(np.array([place])).values.tolist() == expected[query]


# One query (id 0) has 40 of 90 documents as positives, the others have 1 to 3; query 5 is a document too.
NUM_QUERIES, DOCUMENTS = 12, np.append(np.arange(20, 109), 5)
SELECTION = SelectionSettings(pool_size=4, window=45, skip_top=1, margin=0.9)


def hub_source() -> MiningSource:
    rng = np.random.default_rng(4)
    row_query = np.concatenate([np.arange(NUM_QUERIES), [3, 3]])
    positives = [np.arange(20, 60)]
    positives += [rng.choice(np.arange(60, 109), rng.integers(1, 4), replace=False) for _ in row_query[1:]]
    return MiningSource.of_rows("hub", row_query, Ragged.of(positives), np.sort(DOCUMENTS), lambda i: f"text {i}")


def vectors(ids: np.ndarray, kind: str) -> np.ndarray:
    """Small integers: exact scores with ties. A text has another vector as a query than as a document."""
    seeds = [int(i) + (1000 if kind == "query" else 0) for i in ids]
    return np.array([np.random.default_rng(seed).integers(-3, 4, 6) for seed in seeds], np.float32).reshape(-1, 6)


def mine_here(world_size: int, compared: np.ndarray | None) -> Pools:
    """Queries in three parts on every rank, some of them empty."""
    context = context_of(world_size)
    source = hub_source()
    own = np.array_split(source.document_ids, world_size)[context.rank]
    query_parts = np.array_split(source.query_ids[context.rank :: world_size], 3)
    return mine_pools(
        source,
        EmbeddedTexts(own, vectors(own, "document")),
        (EmbeddedTexts(part, vectors(part, "query")) for part in query_parts),
        context,
        SELECTION,
        compared=compared,
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_pools_equal_a_plain_loop(workers: WorkerPool, world_size: int) -> None:
    """A query with more positives than the window has the window's worth of other documents all the same."""
    source = hub_source()
    compared = np.stack([np.arange(20, 20 + NUM_QUERIES), np.full(NUM_QUERIES, -1)], axis=1)
    documents = {int(i): v for i, v in zip(source.document_ids, vectors(source.document_ids, "document"), strict=True)}
    results = workers.run(mine_here, world_size, world_size, compared)
    for place, query in enumerate(source.query_ids.tolist()):
        vector = vectors(np.array([query]), "query")[0]
        positives = source.positives.take(np.array([place])).values.tolist()
        ranked = sorted((-float(vector @ v), i) for i, v in documents.items() if i not in {*positives, query})
        lowest = min(float(vector @ documents[i]) for i in positives)
        looked_at = ranked[SELECTION.skip_top : SELECTION.window]
        kept = [(i, -s) for s, i in looked_at if -s <= lowest - 0.1 * abs(lowest) + 1e-9][: SELECTION.pool_size]
        for pools in results:
            found = pools.ids[place][pools.ids[place] >= 0].tolist()
            assert found == [i for i, _ in kept], query
            assert pools.scores[place, : len(kept)].tolist() == [s for _, s in kept]
            assert pools.positive_scores[place] == lowest
            assert (pools.short_reasons[place] >= 0) == (len(kept) < SELECTION.pool_size)
            assert pools.compared_scores[place, 0] == vector @ documents[int(compared[place, 0])]
            assert np.isnan(pools.compared_scores[place, 1])
    assert any((pools.short_reasons < 0).any() and (pools.short_reasons >= 0).any() for pools in results)


def test_what_can_not_be_mined_is_refused() -> None:
    positives = Ragged.of([np.array([10]), np.array([11, 12])])
    few = MiningSource.of_rows("few", np.array([0, 1]), positives, np.array([10, 11, 12]), str)
    few.check(2)
    with pytest.raises(
        ValueError, match="few has 3 documents, too few for 3 negatives a query beside its positive; add"
    ):
        few.check(3)
    lost = MiningSource.of_rows("lost", np.array([0, 1]), positives, np.array([10, 11, 13, 14]), lambda i: f"text {i}")
    message = (
        r"lost: 1 positives are not among its documents, for example text 12 of query text 1; write the data again"
    )
    with pytest.raises(ValueError, match=message):
        lost.check(1)
