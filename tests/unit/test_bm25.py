"""BM25 against its formula, order among ties, stemming, tuning."""

import math

import numpy as np
import pytest

from megatron_conan.evaluation.bm25 import Bm25Index, Bm25Settings, bm25_rank, tune_bm25

CORPUS = [
    "open zip file path mode read",
    "copy file src dst",
    "read json file decode",
    "copy tree src dst symlinks ignore",
    "copies trees",
    "",
]


def formula(query: str, k1: float, b: float) -> list[float]:
    """Robertson's BM25 with Lucene's idf, without its constant factor (k1 + 1)."""
    documents = [text.split() for text in CORPUS]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        score = 0.0
        for term in query.split():
            frequency = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
            count = words.count(term)
            score += idf * count / (count + k1 * (1 - b + b * len(words) / mean)) if count else 0
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (2.0, 0.9), (0.9, 0.0)])
def test_scores_follow_the_formula(k1: float, b: float) -> None:
    index = Bm25Index(CORPUS, Bm25Settings(k1, b))
    for query in ("copy file", "read json", "tree ignore unknown"):
        np.testing.assert_allclose(index.scores(query), formula(query, k1, b), rtol=1e-5)


def test_rank_is_canonical() -> None:
    corpus = ["b a", "a c", "a d", "x", "a e"]
    scores, indices = bm25_rank(corpus, ["a", "x", "nothing", ""], 3)
    assert indices.tolist() == [[0, 1, 2], [3, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert scores[0, 0] == scores[0, 2] > 0
    assert np.isneginf(scores[1, 1:]).all()


def test_rank_equals_sorting_everything() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(12)]
    corpus = [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(200)]
    queries = [" ".join(rng.choice(words, 3)) for _ in range(20)]
    index = Bm25Index(corpus)
    scores, indices = index.rank(queries, 15)
    for query, row_scores, row in zip(queries, scores, indices, strict=True):
        everything = index.scores(query)
        expected = sorted(np.flatnonzero(everything > 0), key=lambda i: (-everything[i], i))[:15]
        assert row.tolist() == expected
        np.testing.assert_array_equal(row_scores, everything[expected])


def test_stemming_and_stopwords() -> None:
    _, plain = bm25_rank(CORPUS, ["copying the trees"], 5)
    assert plain[0].tolist() == [4, -1, -1, -1, -1]
    _, stemmed = bm25_rank(CORPUS, ["copying the trees"], 5, stemming=True)
    assert set(stemmed[0].tolist()) == {1, 3, 4, -1}
    _, filtered = bm25_rank(["the", "of"], ["the"], 1, stopwords=False)
    assert filtered[0, 0] == 0
    with pytest.raises(ValueError, match="words"):
        bm25_rank(["the", "of"], ["the"], 1, stopwords=True)


def test_tune_chooses_from_the_grid_what_ranks_best() -> None:
    """Long documents repeat the query's words, the short one is relevant: full length normalisation wins."""
    corpus = ["alpha beta", *(f"alpha beta alpha beta filler{i} " + "alpha " * i for i in range(1, 12))]
    settings = tune_bm25(corpus, ["alpha beta"], [0])
    assert settings.stopwords
    assert settings.stemming
    _, indices = Bm25Index(corpus, settings).rank(["alpha beta"], 1)
    assert indices[0, 0] == 0
    with pytest.raises(ValueError, match="relevant"):
        tune_bm25(corpus, ["alpha"], [])
