"""Small cases that no other test decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_contexts import context_of
from test_negatives_table import CORPUS, small_table
from test_select import one_query

from megatron_conan.data.ragged import Ragged
from megatron_conan.mining.encode import EmbeddedTexts
from megatron_conan.mining.pools import MiningSource, mine_pools
from megatron_conan.mining.rows import RowStore, Scratch, weights_fingerprint
from megatron_conan.mining.select import SHORT_REASONS, SelectionSettings, select_negatives
from megatron_conan.mining.shards import ShardedIndex
from megatron_conan.mining.table import NegativesTable


def test_a_ceiling_is_the_highest_allowed_score_and_may_be_zero() -> None:
    assert one_query([0.5, 0.25, 0.0, -0.25], 1.0, ceiling=0.25) == [1, 2, 3]
    assert one_query([0.5, 0.25, 0.0, -0.25], 1.0, ceiling=0.0) == [2, 3]


def test_a_pool_that_lacks_one_has_a_reason() -> None:
    result = select_negatives(
        np.array([[0.9, 0.5]], np.float32), np.array([[3, 4]]), Ragged.of([np.empty(0, int)]), np.array([0.8]),
        SelectionSettings(pool_size=2, margin=1.0),
    )  # fmt: skip
    assert [SHORT_REASONS[i] for i in result.short_reason()] == ["margin"]


def line_source() -> tuple[MiningSource, np.ndarray]:
    """Documents 10 to 29 along a line, scores 20 to 1; query 10 is a document too, with the best score, before 3 positives."""
    documents = np.arange(10, 30)
    source = MiningSource.of_rows("line", np.array([10]), Ragged.of([np.array([11, 12, 13])]), documents, str)
    return source, np.arange(20, 0, -1, dtype=np.float32)[:, None]


def pool_of(selection: SelectionSettings, queries: list[EmbeddedTexts] | None = None) -> list[int]:
    source, rows = line_source()
    query = EmbeddedTexts(np.array([10]), np.ones((1, 1), np.float32))
    pools = mine_pools(
        source,
        EmbeddedTexts(source.document_ids, rows),
        [query] if queries is None else queries,
        context_of(1),
        selection,
    )
    return pools.ids[0].tolist()


def test_the_window_counts_other_documents_only() -> None:
    """All four known ones come first; then a window of 6 is 6 others, not the query itself, nor a positive."""
    assert pool_of(SelectionSettings(pool_size=7, window=6)) == [14, 15, 16, 17, 18, 19, -1]
    assert pool_of(SelectionSettings(pool_size=7, window=100)) == list(range(14, 21))
    assert pool_of(SelectionSettings(pool_size=3, window=6, skip_top=2)) == [16, 17, 18]


def test_queries_that_no_rank_or_two_encoded_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="0 pools for 1 queries"):
        pool_of(SelectionSettings(pool_size=7, window=6), [])
    query = EmbeddedTexts(np.array([10]), np.ones((1, 1), np.float32))
    with pytest.raises(RuntimeError, match="2 pools for 1 queries"):
        pool_of(SelectionSettings(pool_size=7, window=6), [query, query])


def test_documents_out_of_order_are_refused() -> None:
    for ids in ([2, 1], [1, 1], [1, 2, 3]):
        with pytest.raises(ValueError, match="give one row an id, ids rising"):
            ShardedIndex(EmbeddedTexts(np.array(ids), np.ones((2, 3), np.float32)), context_of(1))


def test_the_hash_covers_number_step_and_counters(tmp_path: Path) -> None:
    hashes = {small_table().content_hash()}
    for name in ("version", "step", "num_dry", "num_replaced"):
        table = small_table()
        setattr(table, name, 7)
        hashes.add(table.content_hash())
        table.save(tmp_path / name)
        assert getattr(NegativesTable.load(tmp_path / name, CORPUS), name) == 7
    assert len(hashes) == 5


def test_rows_of_other_ranks_and_sizes_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_conan.mining.rows.SAVE_SECONDS", 0.0)
    scratch, context = Scratch(tmp_path / "pairs", "key"), context_of(1)
    RowStore(10, 3, context, scratch).save(2)
    assert RowStore(10, 3, replace(context, rank=1), scratch).rounds_done == 0
    assert RowStore(10, 3, replace(context, world_size=2), scratch).rounds_done == 0
    assert RowStore(10, 3, context, scratch).rounds_done == 2
    store = RowStore(9, 3, context, scratch)
    assert (store.rounds_done, store.rows.shape) == (0, (9, 3))


def test_a_fingerprint_tells_which_parameter_holds_what() -> None:
    first, second = (torch.nn.ParameterDict({a: torch.ones(3), b: torch.ones(3)}) for a, b in ("ab", "ac"))
    assert weights_fingerprint([first], "") != weights_fingerprint([second], "")
