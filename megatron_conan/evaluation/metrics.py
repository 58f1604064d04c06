"""Ranking metrics per query (trec_eval's own code, as mteb uses it) and bootstrap intervals over queries."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytrec_eval

Qrels = Mapping[str, Mapping[str, int]]
"""query id -> document id -> relevance (above 0: relevant)."""
Run = Mapping[str, Mapping[str, float]]
"""query id -> document id -> score, higher is better; documents left out are not found."""


def ndcg_at_k(run: Run, qrels: Qrels, k: int) -> dict[str, float]:
    """nDCG@k of each judged query; equal scores count in trec_eval's order (document id descending)."""
    return _evaluate(run, qrels, "ndcg_cut", k)


def recall_at_k(run: Run, qrels: Qrels, k: int) -> dict[str, float]:
    """Share of the relevant documents among the first k, for each judged query."""
    return _evaluate(run, qrels, "recall", k)


def rankings_to_run(query_ids: Sequence[str], document_ids: Sequence[str], indices: np.ndarray) -> Run:
    """A run that keeps the order of ranked rows, ties included.

    Args:
        indices: int64 [len(query_ids), k] row numbers into `document_ids`, best first; -1 is empty.
    """
    return {
        query: {document_ids[i]: float(-rank) for rank, i in enumerate(row.tolist()) if i >= 0}
        for query, row in zip(query_ids, indices, strict=True)
    }


def bootstrap_interval(
    values: np.ndarray | Sequence[float], *, confidence: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [q], resampling queries.

    Returns:
        Lower and upper end; the same values and seed give the same interval.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap needs one value a query, got an array of shape {values.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, for example 0.95")
    rng = np.random.default_rng(seed)
    # counts of each query in each resample: [samples, q] @ [q] -> [samples]
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=samples)
    means = counts @ values / len(values)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_bootstrap_interval(
    values: np.ndarray | Sequence[float],
    baseline: np.ndarray | Sequence[float],
    *,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of mean(values - baseline) over the same queries; above 0: better than the baseline."""
    values, baseline = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if values.shape != baseline.shape:
        raise ValueError(f"paired values must be of the same queries, got shapes {values.shape} and {baseline.shape}")
    return bootstrap_interval(values - baseline, confidence=confidence, samples=samples, seed=seed)


def _evaluate(run: Run, qrels: Qrels, measure: str, k: int) -> dict[str, float]:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    unknown = [query for query in run if query not in qrels]
    if unknown:
        raise ValueError(f"{len(unknown)} queries of the run have no judgement, the first is {unknown[0]!r}")
    judged = {query: dict(documents) for query, documents in qrels.items()}
    evaluator = pytrec_eval.RelevanceEvaluator(judged, {f"{measure}.{k}"})
    found = evaluator.evaluate({query: dict(documents) for query, documents in run.items()})
    # trec_eval leaves out queries without results; they found nothing
    return {query: float(found[query][f"{measure}_{k}"]) if query in found else 0.0 for query in judged}
