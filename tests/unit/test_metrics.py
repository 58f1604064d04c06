"""nDCG and recall against their definitions; bootstrap intervals."""

import math

import numpy as np
import pytest

from megatron_conan.evaluation.metrics import (
    bootstrap_interval,
    ndcg_at_k,
    paired_bootstrap_interval,
    rankings_to_run,
    recall_at_k,
)


def test_ndcg_and_recall_by_hand() -> None:
    run = {"a": {"x": 3.0, "y": 2.0, "z": 1.0}, "b": {"z": 1.0}}
    qrels = {"a": {"y": 1}, "b": {"x": 1, "z": 2, "y": 1}, "without results": {"x": 1}}
    ndcg = ndcg_at_k(run, qrels, 2)
    ideal = 2 + 1 / math.log2(3)  # trec_eval takes the relevance itself as gain
    assert ndcg == pytest.approx({"a": 1 / math.log2(3), "b": 2 / ideal, "without results": 0})
    assert recall_at_k(run, qrels, 1) == pytest.approx({"a": 0, "b": 1 / 3, "without results": 0})
    assert recall_at_k(run, qrels, 2)["a"] == 1


def test_ndcg_equals_definition_on_random_rankings() -> None:
    rng = np.random.default_rng(0)
    documents = [f"d{i}" for i in range(30)]
    queries = [f"q{i}" for i in range(20)]
    indices = np.stack([rng.permutation(30)[:12] for _ in queries])
    indices[3, 5:] = -1
    relevant = rng.integers(0, 30, len(queries))
    run = rankings_to_run(queries, documents, indices)
    qrels = {query: {documents[i]: 1} for query, i in zip(queries, relevant, strict=True)}
    expected = {}
    for query, row, i in zip(queries, indices, relevant, strict=True):
        rank = np.flatnonzero(row[:10] == i)
        expected[query] = 1 / math.log2(rank[0] + 2) if len(rank) else 0.0
    assert ndcg_at_k(run, qrels, 10) == pytest.approx(expected)
    assert recall_at_k(run, qrels, 10) == pytest.approx({q: float(v > 0) for q, v in expected.items()})


def test_unjudged_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="'b'"):
        ndcg_at_k({"a": {"x": 1.0}, "b": {"x": 1.0}}, {"a": {"x": 1}}, 10)


def test_bootstrap_interval_covers_the_mean_as_the_normal_does() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, size=400)
    low, high = bootstrap_interval(values, samples=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    # the quantile of 4000 resamples is itself known to about 5% of the half width
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (low, high) == bootstrap_interval(values, samples=4000)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_paired_interval_removes_what_queries_share() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.uniform(size=200)
    better = difficulty + 0.02 + rng.normal(0, 0.01, 200)
    low, high = paired_bootstrap_interval(better, difficulty)
    assert 0.015 < low < high < 0.025
    with pytest.raises(ValueError, match="same queries"):
        paired_bootstrap_interval(better, difficulty[:-1])


def test_bootstrap_refuses_nothing_to_resample() -> None:
    with pytest.raises(ValueError, match="shape"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1.0], confidence=95)
