"""The quick retrieval evaluation that runs inside training: exact search over a BEIR folder, nDCG and recall.

It gives real mteb's scores on the same folder (a test holds that) without mteb's import and dataset machinery.
Legend: q queries, n documents, e embedding dim.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import normalize

from megatron_conan.data.format import TextKind
from megatron_conan.evaluation.beir import RetrievalData, read_beir
from megatron_conan.evaluation.metrics import bootstrap_interval, ndcg_at_k, recall_at_k

DOCUMENT_BLOCK = 50_000  # mteb's
MAX_CANDIDATES = 1000  # a query's scored documents, however many share the k-th score


class EmbedTexts(Protocol):
    """Texts and their kind -> [len(texts), e] float32, the same on every rank that calls it.

    `prompt` names the prompt put before each text, which is none if there is no prompt of that name; `query` or `document`,
    as the kind, if not given.
    """

    def __call__(self, texts: list[str], kind: TextKind, prompt: str | None = None, /) -> np.ndarray: ...


@dataclass(frozen=True)
class RetrievalResult:
    """Scores of one evaluation, one value a query, and the documents found."""

    name: str
    k: int
    num_documents: int
    query_ids: list[str]
    ndcg: np.ndarray
    """nDCG@k [q] float64."""
    recall: np.ndarray
    """Recall@k [q] float64."""
    hits: list[list[tuple[str, float]]]
    """For each query the k best (document id, cosine), in the order (-cosine, document id)."""

    @property
    def mean_ndcg(self) -> float:
        """Mean nDCG@k over queries."""
        return float(self.ndcg.mean())

    @property
    def mean_recall(self) -> float:
        """Mean recall@k over queries."""
        return float(self.recall.mean())

    def ndcg_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the mean nDCG@k over queries."""
        return bootstrap_interval(self.ndcg, confidence=confidence)


def evaluate_retrieval(
    embed_texts: EmbedTexts, eval_dir: str | Path | RetrievalData, *, k: int = 10
) -> RetrievalResult:
    """Embeds corpus and queries, searches exactly by cosine and scores.

    Where `embed_texts` communicates, all its ranks must call this; every rank gets the same result.

    Args:
        embed_texts: gives vectors of any length; they are normalised here, in float32.
        eval_dir: a BEIR folder, or what `read_beir` made of one.

    Raises:
        ValueError: malformed data, or vectors that are not finite or not one row a text.
    """
    data = eval_dir if isinstance(eval_dir, RetrievalData) else read_beir(eval_dir)
    queries = _embed(embed_texts, data.queries, "query")
    documents = _embed(embed_texts, data.documents, "document")
    candidates = search_exact(queries, documents, data.document_ids, k)
    run = {query: dict(found) for query, found in zip(data.query_ids, candidates, strict=True)}
    qrels = {query: data.qrels[query] for query in data.query_ids}
    ndcg, recall = ndcg_at_k(run, qrels, k), recall_at_k(run, qrels, k)
    return RetrievalResult(
        name=data.name,
        k=k,
        num_documents=len(data.documents),
        query_ids=data.query_ids,
        ndcg=np.array([ndcg[query] for query in data.query_ids]),
        recall=np.array([recall[query] for query in data.query_ids]),
        hits=[found[:k] for found in candidates],
    )


def search_exact(
    queries: np.ndarray, documents: np.ndarray, document_ids: list[str], k: int
) -> list[list[tuple[str, float]]]:
    """Finds each query's k best documents and everything that ties with the k-th, by cosine.

    Ties are kept so that a metric's own order among equal scores applies; at most `MAX_CANDIDATES` a query. The products
    are taken as mteb takes them (all queries by blocks of documents, in torch): copies of a document get cosines that
    differ in the last bit with the shape of the product, and with it their order.

    Args:
        queries: [q, e] float32, of any length. documents: [n, e] float32, likewise.

    Returns:
        For each query (document id, cosine) in the order (-cosine, document id).
    """
    found: list[list[tuple[str, float]]] = [[] for _ in queries]
    directions = normalize(torch.from_numpy(queries), dim=1)
    for start in range(0, len(documents), DOCUMENT_BLOCK):
        block = normalize(torch.from_numpy(documents[start : start + DOCUMENT_BLOCK]), dim=1)
        scores = (directions @ block.T).numpy()  # [q, e] x [e, block] -> [q, block]
        best = min(k, scores.shape[1])
        kth = np.partition(scores, -best, axis=1)[:, -best]
        for hits, row, least in zip(found, scores, kth, strict=True):
            hits += [(document_ids[start + column], float(row[column])) for column in np.flatnonzero(row >= least)]
    return [_cut(hits, k) for hits in found]


def _cut(hits: list[tuple[str, float]], k: int) -> list[tuple[str, float]]:
    """Sorts by (-score, id) and drops what scores below the k-th."""
    ordered = sorted(hits, key=lambda hit: (-hit[1], hit[0]))
    least = ordered[min(k, len(ordered)) - 1][1]
    return [hit for hit in ordered[: max(k, MAX_CANDIDATES)] if hit[1] >= least]


def _embed(embed_texts: EmbedTexts, texts: list[str], kind: TextKind) -> np.ndarray:
    """Embeds texts -> [len(texts), e] float32."""
    vectors = np.asarray(embed_texts(texts, kind), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"embed_texts gave an array of shape {vectors.shape} for {len(texts)} {kind} texts")
    if not np.isfinite(vectors).all():
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        raise ValueError(
            f"{len(bad)} of {len(texts)} {kind} vectors are not finite, the first at {bad[0]}: the model "
            "diverged; lower the learning rate or start from an earlier checkpoint"
        )
    return np.ascontiguousarray(vectors)
