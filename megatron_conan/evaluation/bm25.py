"""BM25 baselines over prepared text (words separated by spaces), on the bm25s library.

`IDENTIFIER_BM25` is the plain baseline: identifiers are split already by `data.prepare`. `tune_bm25` adds English stop
words and stemming and chooses k1 and b on training queries, never on the test set.
Legend: q queries, n documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import bm25s
import numpy as np
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from megatron_conan.evaluation.metrics import ndcg_at_k, rankings_to_run

K1_GRID = (0.9, 1.2, 1.6, 2.0, 2.5)
B_GRID = (0.6, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Bm25Settings:
    """Parameters of the ranking function and of the words it sees."""

    k1: float = 1.2
    """Saturation of term frequency; without effect where every word occurs once but through document length."""
    b: float = 0.75
    """Share of length normalisation, 0 to 1."""
    stopwords: bool = False
    """Drop English stop words."""
    stemming: bool = False
    """Snowball English stems instead of words."""


IDENTIFIER_BM25 = Bm25Settings()


class Bm25Index:
    """An inverted index over documents; `rank` gives the same order on every machine."""

    def __init__(self, corpus_texts: Sequence[str], settings: Bm25Settings = IDENTIFIER_BM25) -> None:
        """Index [n] documents.

        Raises:
            ValueError: no document has a word.
        """
        self.settings = settings
        self._stemmer = Stemmer.Stemmer("english") if settings.stemming else None
        words = [self._words(text) for text in corpus_texts]
        if not any(words):
            raise ValueError(f"BM25 needs documents with words, got {len(corpus_texts)} without any")
        self._index = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene")
        self._index.index(words, show_progress=False)
        self.num_documents = len(words)

    def scores(self, query: str) -> np.ndarray:
        """Scores float32 [n] of all documents; zeros for a query of unknown words."""
        words = self._words(query)
        if not self._index.get_tokens_ids(words):
            return np.zeros(self.num_documents, dtype=np.float32)
        return self._index.get_scores(words)

    def rank(self, query_texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query by (-score, document number); documents without a common word are not found.

        Returns:
            scores float32 [q, k], padded with -inf, and document numbers int64 [q, k], padded with -1.
        """
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        scores = np.full((len(query_texts), k), -np.inf, dtype=np.float32)
        indices = np.full((len(query_texts), k), -1, dtype=np.int64)
        for row, query in enumerate(query_texts):
            best_scores, best = _best_positive(self.scores(query), k)
            scores[row, : len(best)], indices[row, : len(best)] = best_scores, best
        return scores, indices

    def _words(self, text: str) -> list[str]:
        words = text.split()
        if self.settings.stopwords:
            words = [word for word in words if word not in STOPWORDS_EN]
        return self._stemmer.stemWords(words) if self._stemmer else words


def bm25_rank(
    corpus_texts: Sequence[str],
    query_texts: Sequence[str],
    k: int,
    *,
    k1: float = IDENTIFIER_BM25.k1,
    b: float = IDENTIFIER_BM25.b,
    stopwords: bool = False,
    stemming: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Index documents and rank them for each query: `Bm25Index(...).rank(...)` in one call."""
    return Bm25Index(corpus_texts, Bm25Settings(k1, b, stopwords, stemming)).rank(query_texts, k)


def tune_bm25(
    corpus_texts: Sequence[str], query_texts: Sequence[str], relevant: Sequence[int], *, k: int = 10
) -> Bm25Settings:
    """Choose k1 and b by mean nDCG@k, with stop words and stemming on. Give it training rows, not the test set.

    Args:
        relevant: [q] the number of the one relevant document of each query.
    """
    if len(relevant) != len(query_texts) or not query_texts:
        raise ValueError(
            f"{len(query_texts)} queries need as many relevant documents and at least one, got {len(relevant)}"
        )
    query_ids, document_ids = [str(i) for i in range(len(query_texts))], [str(i) for i in range(len(corpus_texts))]
    qrels = {query: {document_ids[i]: 1} for query, i in zip(query_ids, relevant, strict=True)}
    best, best_score = Bm25Settings(stopwords=True, stemming=True), -1.0
    for settings in (replace(best, k1=k1, b=b) for k1 in K1_GRID for b in B_GRID):
        _, indices = Bm25Index(corpus_texts, settings).rank(query_texts, k)
        ndcg = ndcg_at_k(rankings_to_run(query_ids, document_ids, indices), qrels, k)
        score = float(np.mean(list(ndcg.values())))
        if score > best_score:
            best, best_score = settings, score
    return best


def _best_positive(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best entries above 0 of scores [n] in the order (-score, position)."""
    positions = np.flatnonzero(scores > 0)
    if len(positions) > k:
        kth = np.partition(scores[positions], len(positions) - k)[len(positions) - k]
        positions = positions[scores[positions] >= kth]
    order = positions[np.lexsort((positions, -scores[positions]))][:k]
    return scores[order], order
