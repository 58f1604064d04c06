"""Selection of hard negatives against a plain loop, and the cases that are easy to get wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_conan.data.ragged import Ragged
from megatron_conan.mining.select import (
    BEYOND_WINDOW,
    KNOWN,
    MARGIN,
    SHORT_REASONS,
    SKIPPED,
    SelectionSettings,
    lowest_scores,
    select_negatives,
)


def plain_pool(
    scores: list[float], ids: list[int], known: list[int], positives: list[float], s: SelectionSettings
) -> list[int]:
    """One query, written as it is said."""
    candidates = [(score, i) for score, i in zip(scores, ids, strict=True) if i >= 0 and i not in known]
    candidates = candidates[s.skip_top : s.window]
    positive = min(positives)
    if s.margin is not None:
        if s.margin_kind == "absolute":
            limit = positive - s.margin
        elif positive >= 0:
            limit = s.margin * positive
        else:
            limit = positive - (1 - s.margin) * abs(positive)
        candidates = [c for c in candidates if c[0] <= limit]
    if s.ceiling is not None:
        candidates = [c for c in candidates if c[0] <= s.ceiling]
    return [i for _, i in candidates][: s.pool_size]


quarters = st.integers(-8, 8).map(lambda n: n / 8)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray], SelectionSettings]:
    num_queries, width = draw(st.integers(0, 4)), draw(st.integers(1, 12))
    scores = np.full((num_queries, width), -np.inf, np.float32)
    ids = np.full((num_queries, width), -1, np.int64)
    for i in range(num_queries):
        found = draw(st.lists(st.integers(0, 20), max_size=width, unique=True))
        ids[i, : len(found)] = found
        falling = sorted(draw(st.lists(quarters, min_size=len(found), max_size=len(found))), reverse=True)
        scores[i, : len(found)] = falling
    known = [np.array(draw(st.lists(st.integers(0, 20), max_size=4)), np.int64) for _ in range(num_queries)]
    lists = st.lists(quarters, min_size=1, max_size=3)
    positives = [np.array(draw(lists), np.float32) for _ in range(num_queries)]
    skip_top = draw(st.integers(0, 3))
    selection = SelectionSettings(
        pool_size=draw(st.integers(1, 6)),
        window=draw(st.one_of(st.none(), st.integers(skip_top + 1, 14))),
        skip_top=skip_top,
        margin=draw(st.sampled_from([None, 0.5, 0.75, 1.0])),
        margin_kind=draw(st.sampled_from(["relative", "absolute"])),
        ceiling=draw(st.sampled_from([None, 0.5])),
    )
    return scores, ids, known, positives, selection


@settings(max_examples=300, deadline=None)
@given(cases())
def test_equals_the_plain_loop(case: tuple) -> None:
    scores, ids, known, positives, selection = case
    scored = Ragged.of(positives)
    lowest = lowest_scores(np.concatenate([np.empty(0, np.float32), *positives]), scored.offsets)
    result = select_negatives(scores, ids, Ragged.of(known), lowest, selection)
    for i in range(len(scores)):
        expected = plain_pool(scores[i].tolist(), ids[i].tolist(), known[i].tolist(), positives[i].tolist(), selection)
        pool = result.ids[i]
        assert pool[pool >= 0].tolist() == expected
        assert (pool[len(expected) :] == -1).all()
        assert (result.scores[i, len(expected) :] == -np.inf).all()
        score_of = dict(zip(ids[i].tolist(), scores[i].tolist(), strict=True))
        assert result.scores[i, : len(expected)].tolist() == [score_of[j] for j in expected]
        assert result.missing[i] == selection.pool_size - len(expected)
        untaken = (ids[i] >= 0).sum() - result.rejected[i].sum()
        assert min(untaken, selection.pool_size) == len(expected)


def one_query(scores: list[float], positive: float, **options: object) -> list[int]:
    ids = np.arange(len(scores))[None]
    selection = SelectionSettings(pool_size=len(scores), **options)  # type: ignore[arg-type]
    result = select_negatives(
        np.array([scores], np.float32), ids, Ragged.of([np.empty(0, int)]), np.array([positive]), selection
    )
    return result.ids[0][result.ids[0] >= 0].tolist()


def test_margin_never_goes_the_wrong_way() -> None:
    # 0.75 x -0.5 = -0.375 lies above the positive; the mirrored limit is -0.625.
    assert one_query([-0.375, -0.5, -0.5625, -0.625, -0.75], -0.5, margin=0.75) == [3, 4]
    assert one_query([0.375, 0.5, 0.25], 0.5, margin=0.75) == [0, 2]
    assert one_query([0.0, -0.5], 0.0, margin=0.75) == [0, 1]
    assert one_query([-0.5, -0.75, -1.0], -0.5, margin=0.25, margin_kind="absolute") == [1, 2]


def test_lowest_of_several_positives_counts() -> None:
    scores, ids = np.array([[0.9, 0.7, 0.5]], np.float32), np.array([[10, 11, 12]])
    selection = SelectionSettings(pool_size=3, margin=1.0)
    result = select_negatives(
        scores, ids, Ragged.of([np.array([1])]), lowest_scores(np.array([0.95, 0.6]), np.array([0, 2])), selection
    )
    assert result.ids.tolist() == [[12, -1, -1]]
    assert result.rejected[0, MARGIN] == 2


def test_skipped_places_do_not_count_known_documents() -> None:
    scores, ids = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], np.float32), np.array([[3, 4, 5, 6, 7]])
    selection = SelectionSettings(pool_size=4, skip_top=1, window=3)
    result = select_negatives(scores, ids, Ragged.of([np.array([3])]), np.array([1.0]), selection)
    assert result.ids.tolist() == [[5, 6, -1, -1]]
    assert result.rejected[0, [KNOWN, BEYOND_WINDOW, SKIPPED]].tolist() == [1, 1, 1]


def test_short_queries_are_counted_by_their_main_reason() -> None:
    scores = np.array([[0.9, 0.8, 0.1], [0.9, 0.8, 0.7], [0.4, 0.3, -np.inf]], np.float32)
    ids = np.array([[1, 2, 3], [1, 2, 3], [1, 2, -1]])
    known = Ragged.of([np.empty(0, int), np.empty(0, int), np.array([1])])
    result = select_negatives(scores, ids, known, np.array([0.5, 1.0, 1.0]), SelectionSettings(pool_size=3, margin=0.9))
    assert result.missing.tolist() == [2, 0, 2]
    reasons = result.short_reason()
    assert reasons[1] == -1
    assert [SHORT_REASONS[reason] for reason in reasons[[0, 2]]] == ["margin", "corpus"]


def test_sampling_is_seeded_even_and_independent_of_the_layout() -> None:
    num_queries, width, pool_size = 400, 20, 5
    ids = np.tile(np.arange(width), (num_queries, 1))
    scores = np.tile(np.linspace(1, 0, width, dtype=np.float32), (num_queries, 1))
    known = Ragged.of([np.array([0])] * num_queries)
    query_ids = np.arange(num_queries) + 1000
    selection = SelectionSettings(pool_size=pool_size, sample_seed=7)

    def run(rows: np.ndarray, seed: int = 7) -> np.ndarray:
        chosen = SelectionSettings(pool_size=pool_size, sample_seed=seed)
        return select_negatives(
            scores[rows], ids[rows], known.take(rows), np.ones(len(rows)), chosen, query_ids[rows]
        ).ids

    rows = np.arange(num_queries)
    whole = run(rows)
    assert np.array_equal(whole[1::2], run(rows[1::2]))
    assert not np.array_equal(whole, run(rows, seed=8))
    assert (np.diff(whole, axis=1) > 0).all()  # best first, none twice
    counts = np.bincount(whole.ravel(), minlength=width)
    assert counts[0] == 0
    # Each of 19 candidates is drawn with probability 5/19: mean 105, standard deviation 8.8; 5 of these to each side.
    assert np.abs(counts[1:] - 105).max() < 44
    with pytest.raises(ValueError, match="query_ids"):
        select_negatives(scores, ids, known, np.ones(num_queries), selection)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="window=3 leaves nothing after skip_top=3"):
        SelectionSettings(pool_size=1, window=3, skip_top=3)
    with pytest.raises(ValueError, match=r"margin=1\.05"):
        SelectionSettings(pool_size=1, margin=1.05)
    with pytest.raises(ValueError, match="positive score of query 1 is not finite"):
        select_negatives(
            np.zeros((2, 1), np.float32),
            np.zeros((2, 1), np.int64),
            Ragged.of([np.empty(0, int)] * 2),
            np.array([1.0, np.nan]),
            SelectionSettings(pool_size=1, margin=0.9),
        )
